#include "trajectory_launch.h"

namespace fmft::cuda {

FMFT_ADAPTIVE_KERNELS(1)

}  // namespace fmft::cuda
