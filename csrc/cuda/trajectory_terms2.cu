#include "trajectory_launch.h"

namespace fmft::cuda {

FMFT_TRAJECTORY_KERNELS(2)

}  // namespace fmft::cuda
