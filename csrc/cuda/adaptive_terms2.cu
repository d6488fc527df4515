#include "trajectory_launch.h"

namespace fmft::cuda {

FMFT_ADAPTIVE_KERNELS(2)

}  // namespace fmft::cuda
