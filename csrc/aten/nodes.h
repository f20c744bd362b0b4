// nodes.h: nodes of autograd that are ours.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include "csrc/runtime/torch_version.h"

namespace flagos {

// A new node, in the pointer that torch counts nodes by.
template <class Node>
auto make_node() {
#if FLAGOS_INTRUSIVE_NODES
  return c10::make_intrusive<Node>();
#else
  return std::shared_ptr<Node>(new Node, torch::autograd::deleteNode);
#endif
}

// `node`, whose next edges are set, computes the gradients behind `result`, its only output.
template <class Pointer>
void set_node(const at::Tensor& result, const Pointer& node) {
  node->add_input_metadata(result);
  torch::autograd::impl::set_gradient_edge(result, {node, 0});
}

}  // namespace flagos
