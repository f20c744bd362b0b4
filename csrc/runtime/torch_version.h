// torch_version.h: every difference between the supported PyTorch releases that the C++ code has to know.
#pragma once

#include <torch/headeronly/version.h>

// True when compiled against PyTorch maj.min or newer.
#define FLAGOS_TORCH_GE(maj, min) \
  (TORCH_VERSION_MAJOR > (maj) || (TORCH_VERSION_MAJOR == (maj) && TORCH_VERSION_MINOR >= (min)))

// Nodes of the autograd graph are counted by c10's pointers, no longer by std::shared_ptr.
#define FLAGOS_INTRUSIVE_NODES __has_include(<torch/csrc/autograd/node.h>)
