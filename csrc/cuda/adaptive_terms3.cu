#include "trajectory_launch.h"

namespace fmft::cuda {

FMFT_ADAPTIVE_KERNELS(3)

}  // namespace fmft::cuda
