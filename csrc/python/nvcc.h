// What nvcc was told to build for, as the compiler itself says.
#pragma once

#include <string>
#include <vector>

namespace vtw {

std::string cuda_version();             // "13.0"
std::vector<std::string> cuda_archs();  // {"8.0", "9.0", ...}

}  // namespace vtw
