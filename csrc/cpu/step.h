// The step ops on the CPU: the loops of the best instruction set, split over threads.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fmft::cpu {

void rk_combine(const StepCall& call, int threads);
void rk_finish(const StepCall& call, const ErrorCall& error, int threads);
void dense_eval(const StepCall& call, const DenseCall& dense, int threads);

std::vector<std::string> instruction_sets();  // those of this processor, the best first
std::string instruction_set();                // the one in use
void use_instruction_set(const std::string& name);

}  // namespace fmft::cpu
