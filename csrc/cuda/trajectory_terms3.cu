#include "trajectory_launch.h"

namespace fmft::cuda {

FMFT_TRAJECTORY_KERNELS(3)

}  // namespace fmft::cuda
