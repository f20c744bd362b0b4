// boxed.cc: relabelling for any operator through its schema: other libraries' operators, newer torch's, and every
// layout but the strided one (sparse, compressed sparse, nested, quantized).
#include "csrc/aten/boxed.h"

#include <torch/library.h>

#include <set>

#include "csrc/aten/call.h"
#include "csrc/aten/interop.h"
#include "csrc/aten/route.h"

namespace flagos {

namespace {

bool mixed_devices_allowed(const std::string& name) {
  if (name.compare(0, 6, "aten::") != 0) return false;
  static const std::set<std::string> names{"aten::index",         "aten::index_put_",        "aten::index_put",
                                           "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::_index_put_impl_",
                                           "aten::copy_",         "aten::_copy_from"};
  return names.count(name) > 0;
}

// The original arguments, which the Call points at.
using Kept = c10::SmallVector<at::Tensor, 8>;

// An upper bound of the tensors in one argument.
size_t tensors_in(const c10::IValue& value) {
  return value.isTensor() ? 1 : value.isTensorList() || value.isOptionalTensorList() ? value.toListRef().size() : 0;
}

// Relabels one argument in place on the stack. `kept` has room for its tensors, so that they stay where they are.
void map_argument(Call& call, c10::IValue& value, bool write, Kept& kept) {
  const auto keep = [&](at::Tensor t) -> const at::Tensor& {
    kept.push_back(std::move(t));
    return kept.back();
  };
  if (value.isTensor()) {
    const auto& original = keep(std::move(value).toTensor());
    auto alias = call[call.add(original, write)];
    // _sparse_mm_reduce_impl reads requires_grad of its inputs; autograd metadata is made only there.
    if (original.defined() && original.is_sparse_csr() && original.requires_grad()) {
      alias.unsafeGetTensorImpl()->set_requires_grad(true);
    }
    value = std::move(alias);
  } else if (value.isTensorList()) {
    const auto list = std::move(value).toTensorList();
    c10::List<at::Tensor> aliases;
    aliases.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      aliases.push_back(call[call.add(keep(list.get(i)), write, /*list=*/true)]);
    }
    value = std::move(aliases);
  } else if (value.isOptionalTensorList()) {
    const auto list = std::move(value).toOptionalTensorList();
    c10::List<std::optional<at::Tensor>> aliases;
    aliases.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      std::optional<at::Tensor> t = list.get(i);
      if (t) t = call[call.add(keep(std::move(*t)), write, /*list=*/true)];
      aliases.push_back(std::move(t));
    }
    value = std::move(aliases);
  } else if (value.isDevice()) {
    value = call.map(value.toDevice());
  } else if (value.isStream()) {
    value = call.map(value.toStream());
  } else if (value.isStorage()) {
    value = call.add(value.toStorage());
  }
}

void map_result(Call& call, c10::IValue& value) {
  if (value.isTensor()) {
    at::Tensor t = std::move(value).toTensor();
    value = c10::IValue();  // the stack's reference would make the tensor look shared
    value = call.result(std::move(t));
  } else if (value.isTensorList()) {
    auto list = std::move(value).toTensorVector();
    value = c10::IValue();
    c10::List<at::Tensor> mapped;
    mapped.reserve(list.size());
    for (auto& t : list) mapped.push_back(call.result(std::move(t)));
    value = std::move(mapped);
  }
}

bool is_generator_argument(const c10::Argument& argument) {
  const auto& type = *argument.type();
  if (type.kind() == c10::TypeKind::GeneratorType) return true;
  return type.kind() == c10::TypeKind::OptionalType &&
         type.castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

}  // namespace

void relabel_boxed(const c10::OperatorHandle& op, c10::DispatchKey functionality, torch::jit::Stack* stack) {
  const auto key = native.key(functionality);
  TORCH_CHECK_NOT_IMPLEMENTED(native.present && op.hasComputedKernelForDispatchKey(key), "Could not run '",
                              c10::toString(op.operator_name()), "' on flagos (", platform().chip(),
                              "): torch has no kernel for ", key);
  relabel_call(op, stack, [&] { op.redispatchBoxed(c10::DispatchKeySet(key), stack); });
}

void relabel_call(const c10::OperatorHandle& op, torch::jit::Stack* stack, c10::function_ref<void()> run) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  const bool changes = schema.is_mutable();
  // torch's own operators count versions above this kernel, another library's on the tensors that it works on.
  BelowAutograd below(changes && !op.hasKernelForDispatchKey(c10::DispatchKey::ADInplaceOrView));
  size_t tensors = 0;
  for (size_t i = first; i < stack->size(); ++i) tensors += tensors_in((*stack)[i]);
  Kept kept;
  kept.reserve(tensors);
  Call call;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = arguments[i].alias_info();
    map_argument(call, (*stack)[first + i], alias && alias->isWrite(), kept);
  }
  call.enter(op.operator_name().name.c_str(), mixed_devices_allowed(op.operator_name().name));
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (!(value.isNone() || value.isGenerator()) || !is_generator_argument(arguments[i])) continue;
    auto generator = value.isNone() ? std::optional<at::Generator>() : value.toOptional<at::Generator>();
    generator = call.map(generator);
    if (generator) value = *generator;
  }
  try {
    run();
  } catch (c10::Error& error) {
    tell(error, op.operator_name().name.c_str());
    throw;
  }
  if (changes) call.write_back();
  const size_t results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) map_result(call, (*stack)[i]);
}

namespace {

template <c10::DispatchKey functionality>
void relabel_layout(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  relabel_boxed(op, functionality, stack);
}

template <c10::DispatchKey functionality>
c10::KernelFunction layout_kernel() {
  return c10::KernelFunction::makeFromBoxedFunction<&relabel_layout<functionality>>();
}

// Defaults that only throw (is_coalesced, col_indices, ...) would win over a fallback, so each kernel of the native
// layout gets a registration of its own.
void register_layout(c10::DispatchKey native_key, c10::DispatchKey flagos_key, c10::KernelFunction (*kernel)()) {
  static auto* const handles = new std::vector<c10::RegistrationHandleRAII>;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(native_key)) {
    const auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema() || op->hasKernelForDispatchKey(flagos_key)) continue;
    // As in register.cc: a composition is left alone, unless torch has a derivative for the operator as a whole, which
    // for linear and matmul of nested tensors it has.
    if (op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
        !op->hasKernelForDispatchKey(c10::DispatchKey::Autograd)) {
      continue;
    }
    handles->push_back(dispatcher.registerImpl(name, flagos_key, kernel(), std::nullopt, nullptr, "flagos layout"));
  }
}

}  // namespace

void register_layouts() {
  using c10::DispatchKey;
  register_layout(native.key(DispatchKey::Sparse), DispatchKey::SparsePrivateUse1, &layout_kernel<DispatchKey::Sparse>);
  register_layout(native.key(DispatchKey::SparseCsr), DispatchKey::SparseCsrPrivateUse1,
                  &layout_kernel<DispatchKey::SparseCsr>);
  register_layout(native.key(DispatchKey::NestedTensor), DispatchKey::NestedTensorPrivateUse1,
                  &layout_kernel<DispatchKey::NestedTensor>);
  register_layout(native.key(DispatchKey::Quantized), DispatchKey::QuantizedPrivateUse1,
                  &layout_kernel<DispatchKey::Quantized>);
}

}  // namespace flagos

namespace {

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  flagos::boxed_route(op, keys, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&flagos::relabel_layout<c10::DispatchKey::Sparse>>());
}
TORCH_LIBRARY_IMPL(_, SparseCsrPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&flagos::relabel_layout<c10::DispatchKey::SparseCsr>>());
}
TORCH_LIBRARY_IMPL(_, NestedTensorPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&flagos::relabel_layout<c10::DispatchKey::NestedTensor>>());
}
TORCH_LIBRARY_IMPL(_, QuantizedPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&flagos::relabel_layout<c10::DispatchKey::Quantized>>());
}
