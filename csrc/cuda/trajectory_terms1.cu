#include "trajectory_launch.h"

namespace fmft::cuda {

FMFT_TRAJECTORY_KERNELS(1)

}  // namespace fmft::cuda
