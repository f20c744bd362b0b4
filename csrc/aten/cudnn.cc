// cudnn.cc: cuDNN on a chip that is CUDA underneath.
//
// torch composes batch_norm, grid_sampler, ctc_loss and the recurrent layers of cuDNN's operators on a device that
// calls itself cuda, and of others everywhere else. The choice is made here as torch makes it, by torch's own functions
// where there are any, on tensors that say cuda. What is composed of cuDNN's operators is differentiable like torch's;
// everything else goes to torch's composition.
#include "csrc/aten/cudnn.h"

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/GridSamplerUtils.h>
#include <ATen/native/Normalization.h>
#include <ATen/ops/_batch_norm_impl_index_native.h>
#include <ATen/ops/ctc_loss_native.h>
#include <ATen/ops/cudnn_is_acceptable_native.h>
#include <ATen/ops/grid_sampler_native.h>
#include <ATen/ops/gru_native.h>
#include <ATen/ops/lstm_native.h>
#include <ATen/ops/rnn_relu_native.h>
#include <ATen/ops/rnn_tanh_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <torch/library.h>

#include <map>
#include <mutex>

#include "csrc/aten/call.h"

namespace flagos {

namespace {

using at::Tensor;
using at::TensorList;
using Optional = const std::optional<Tensor>&;

// A tensor with memory, whose alias can be asked; not a wrapper.
bool plain(const Tensor& t) {
  return is_flagos(t) && t.layout() == at::kStrided && (t.key_set() & at::kTensorSubclassLike).empty();
}

// ---- normalization, sampling, CTC

using BatchNorm = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t>;

BatchNorm batch_norm(const Tensor& input, Optional weight, Optional bias, Optional mean, Optional variance,
                     bool training, double momentum, double eps, bool cudnn_enabled) {
  const auto of = [](Optional t) { return t.value_or(Tensor()); };
  // Whether torch's checks pass; it has the texts of those that do not.
  const auto fits = [&](Optional t, bool needed) {
    return t && t->defined() ? t->sym_numel() == input.sym_size(1) : !needed;
  };
  const auto chosen = [&] {
    Call call;
    return at::native::_select_batch_norm_backend(call[call.add(input, /*write=*/false)], of(weight), of(bias),
                                                  of(mean), of(variance), training, eps);
  };
  const bool valid = plain(input) && input.dim() > 1 && input.numel() > 0 && fits(weight, false) && fits(bias, false) &&
                     fits(mean, !training) && fits(variance, !training);
  if (!valid || chosen() != at::native::BatchNormBackend::Cudnn) {
    return at::native::_batch_norm_impl_index(input, weight, bias, mean, variance, training, momentum, eps,
                                              cudnn_enabled);
  }
  const auto contiguous = [](Optional t) { return t && t->defined() ? t->contiguous() : Tensor(); };
  return std::tuple_cat(
      at::cudnn_batch_norm(input.contiguous(input.suggest_memory_format()), weight->contiguous(), contiguous(bias),
                           contiguous(mean), contiguous(variance), training, momentum, eps),
      std::tuple<int64_t>(1));
}

Tensor grid_sampler(const Tensor& input, const Tensor& grid, int64_t interpolation, int64_t padding,
                    bool align_corners) {
  using at::native::GridSamplerInterpolation;
  using at::native::GridSamplerPadding;
  if (align_corners && interpolation == static_cast<int64_t>(GridSamplerInterpolation::Bilinear) &&
      padding == static_cast<int64_t>(GridSamplerPadding::Zeros) && plain(input) && plain(grid)) {
    Call call;
    const auto a = call.add(input, /*write=*/false), b = call.add(grid, /*write=*/false);
    if (at::native::cond_cudnn_grid_sampler(call[a], call[b])) return at::cudnn_grid_sampler(input, grid);
  }
  return at::native::grid_sampler(input, grid, interpolation, padding, align_corners);
}

Tensor clamped(at::IntArrayRef lengths, const Tensor& like) { return at::tensor(lengths, like.options()).clamp_min(1); }
// On the loss's device: torch leaves CPU lengths where they are, and the division then fails.
Tensor clamped(const Tensor& lengths, const Tensor& like) { return lengths.to(like.device()).clamp_min(1); }

template <class Lengths>
Tensor cudnn_ctc_loss(const Tensor& log_probs, const Tensor& targets, Lengths input_lengths, Lengths target_lengths,
                      int64_t blank, int64_t reduction, bool zero_infinity) {
  const auto loss = std::get<0>(at::_cudnn_ctc_loss(log_probs, targets, input_lengths, target_lengths, blank,
                                                    /*deterministic=*/true, zero_infinity));
  if (reduction == at::Reduction::Mean) return (loss / clamped(target_lengths, loss)).mean();
  return reduction == at::Reduction::Sum ? loss.sum() : loss;
}

Tensor ctc_loss_of_lists(const Tensor& log_probs, const Tensor& targets, at::IntArrayRef input_lengths,
                         at::IntArrayRef target_lengths, int64_t blank, int64_t reduction, bool zero_infinity) {
  const bool batched = log_probs.dim() == 3;
  const auto input = batched ? log_probs : log_probs.unsqueeze(1);
  if (!plain(input) || !at::_use_cudnn_ctc_loss(input, targets, input_lengths, target_lengths, blank)) {
    return at::native::ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity);
  }
  auto loss = cudnn_ctc_loss(input, targets, input_lengths, target_lengths, blank, reduction, zero_infinity);
  return batched || reduction != at::Reduction::None ? loss : loss.squeeze(0);
}

// With lengths in tensors cuDNN takes batches only; what it does not take is asked for again with lists.
Tensor ctc_loss_of_tensors(const Tensor& log_probs, const Tensor& targets, const Tensor& input_lengths,
                           const Tensor& target_lengths, int64_t blank, int64_t reduction, bool zero_infinity) {
  if (!plain(log_probs) || !at::isIntegralType(input_lengths.scalar_type(), /*includeBool=*/false) ||
      !at::isIntegralType(target_lengths.scalar_type(), /*includeBool=*/false)) {
    return at::native::ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity);
  }
  if (at::_use_cudnn_ctc_loss(log_probs, targets, input_lengths, target_lengths, blank)) {
    return cudnn_ctc_loss<const Tensor&>(log_probs, targets, input_lengths, target_lengths, blank, reduction,
                                         zero_infinity);
  }
  const auto list = [](const Tensor& t) { return t.to(at::kCPU, at::kLong).contiguous(); };
  const auto inputs = list(input_lengths), goals = list(target_lengths);
  const auto numbers = [](const Tensor& t) {
    return at::IntArrayRef(t.const_data_ptr<int64_t>(), static_cast<size_t>(t.numel()));
  };
  return ctc_loss_of_lists(log_probs, targets, numbers(inputs), numbers(goals), blank, reduction, zero_infinity);
}

// ---- recurrent layers

CudaRnn cuda_rnn;

// The state of a device's dropout: some megabytes that cuDNN fills from a seed and changes in every call. Made at the
// first use and after the device was seeded, and used by one call at a time: by one thread, and in stream order. An
// event that was recorded outside of a graph capture cannot be waited for inside, nor the other way round, so the order
// is kept only within either.
struct DropoutState {
  std::mutex mutex;
  Tensor buffer;
  std::optional<c10::Event> event;
  c10::DeviceIndex index = 0;
  unsigned long long here = 0, last = 0;

  void lock() {
    mutex.lock();
    if (!event) return;
    here = cuda_rnn.capture(index);
    if (here == last) event->block(platform().current_stream(index));
  }
  void unlock() {
    if (event) {
      event->record(platform().current_stream(index));
      last = here;
    }
    mutex.unlock();
  }
};

DropoutState& dropout_state(double p, bool train, const Tensor& input) {
  static auto* const states = new std::vector<DropoutState>(platform().device_count());
  static std::mutex making;
  const std::lock_guard<std::mutex> one(making);
  auto& state = states->at(input.device().index());
  if (!train || p <= 0) return state;
  const bool reseeded = cuda_rnn.reseeded(input.device().index());
  if (state.buffer.defined() && !reseeded) return state;
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto seed = at::empty({}, input.options().dtype(at::kLong)).random_().item<int64_t>();
  state.buffer = at::_cudnn_init_dropout_state(p, train, seed, input.options().dtype(at::kByte));
  state.index = input.device().index();
  if (!state.event) state.event.emplace(kFlagos);
  return state;
}

struct Layers {
  int64_t mode;  // cudnnRNNMode_t
  bool biases;
  int64_t count;
  double dropout;
  bool train, bidirectional, batch_first;
};
enum : int64_t { kRelu, kTanh, kLstm, kGru };

// Where cuDNN wants the weights of such layers in one buffer. Found out by letting it place some of the same sizes.
struct Placing {
  int64_t numel = 0;
  std::vector<int64_t> offsets;
};
Placing placing_of(TensorList weights, int64_t per_layer, int64_t input, int64_t hidden, int64_t projection,
                   const Layers& layers) {
  std::vector<int64_t> key{static_cast<int64_t>(weights[0].scalar_type()),
                           layers.mode,
                           per_layer,
                           input,
                           hidden,
                           projection,
                           layers.count,
                           layers.bidirectional};
  static std::mutex mutex;
  static auto* const known = new std::map<std::vector<int64_t>, Placing>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known->find(key);
  if (found != known->end()) return found->second;
  std::vector<Tensor> like;
  for (const auto& w : weights) like.push_back(at::empty(w.sizes(), w.options()));
  Placing placing;
  placing.numel = at::_cudnn_rnn_flatten_weight(like, per_layer, input, layers.mode, hidden, projection, layers.count,
                                                /*batch_first=*/false, layers.bidirectional)
                      .numel();
  for (const auto& w : like) placing.offsets.push_back(w.storage_offset());
  return known->emplace(std::move(key), std::move(placing)).first->second;
}

// The buffer that the weights lie in as cuDNN wants them (flatten_parameters() makes it so); undefined otherwise, and
// then every call copies them into one.
Tensor flat_buffer(const Tensor& input, TensorList weights, int64_t per_layer, int64_t hidden, int64_t projection,
                   const Layers& layers) {
  for (const auto& w : weights) {
    if (!w.is_alias_of(weights[0]) || w.scalar_type() != weights[0].scalar_type()) return {};
  }
  const at::NoGradGuard no_grad;
  const auto placing = placing_of(weights, per_layer, input.size(-1), hidden, projection, layers);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].storage_offset() != placing.offsets[i]) return {};
  }
  const auto& storage = weights[0].storage();
  const auto room = static_cast<int64_t>(storage.nbytes() / weights[0].itemsize());
  if (room < placing.numel || !weights.back().is_contiguous()) return {};
  return at::empty({0}, weights[0].options()).set_(storage, 0, {placing.numel});
}

std::tuple<Tensor, Tensor, Tensor> recurrent(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                             TensorList weights, const Layers& layers,
                                             at::IntArrayRef batch_sizes = {}) {
  auto hidden = hx.size(2);
  int64_t projection = 0;
  if (cx.defined() && cx.size(2) != hidden) {
    projection = hidden;
    hidden = cx.size(2);
  }
  const int64_t per_layer = (layers.biases ? 4 : 2) + (projection ? 1 : 0);
  const c10::DeviceGuard guard(input.device());
  const auto buffer = flat_buffer(input, weights, per_layer, hidden, projection, layers);
  auto& dropout = dropout_state(layers.dropout, layers.train, input);
  const std::unique_lock<DropoutState> in_order(dropout);
  auto results = at::_cudnn_rnn(input, weights, per_layer, buffer, hx, cx, layers.mode, hidden, projection,
                                layers.count, layers.batch_first, layers.dropout, layers.train, layers.bidirectional,
                                batch_sizes, dropout.buffer);
  return {std::get<0>(results), std::get<1>(results), std::get<2>(results)};
}

bool recurrent_on_cudnn(const Tensor& input) {
  if (!plain(input)) return false;
  Call call;
  const auto type = input.scalar_type();
  return at::native::cudnn_is_acceptable(call[call.add(input, /*write=*/false)]) &&
         (type == at::kFloat || type == at::kDouble || type == at::kHalf ||
          (type == at::kBFloat16 && at::detail::getCUDAHooks().supportsBFloat16RNNWithCuDNN()));
}

at::IntArrayRef sizes_in(const Tensor& batch_sizes) {
  TORCH_CHECK(batch_sizes.dim() == 1, "batch_sizes tensor should be 1D");
  return {batch_sizes.const_data_ptr<int64_t>(), static_cast<size_t>(batch_sizes.size(0))};
}

std::tuple<Tensor, Tensor, Tensor> lstm(const Tensor& input, TensorList hx, TensorList weights, bool biases,
                                        int64_t layers, double dropout, bool train, bool bidirectional,
                                        bool batch_first) {
  TORCH_CHECK(hx.size() == 2, "lstm expects two hidden states");
  if (!recurrent_on_cudnn(input)) {
    return at::native::lstm(input, hx, weights, biases, layers, dropout, train, bidirectional, batch_first);
  }
  return recurrent(input, hx[0], hx[1], weights, {kLstm, biases, layers, dropout, train, bidirectional, batch_first});
}

std::tuple<Tensor, Tensor, Tensor> lstm_packed(const Tensor& data, const Tensor& batch_sizes, TensorList hx,
                                               TensorList weights, bool biases, int64_t layers, double dropout,
                                               bool train, bool bidirectional) {
  TORCH_CHECK(hx.size() == 2, "lstm expects two hidden states");
  if (!recurrent_on_cudnn(data)) {
    return at::native::lstm(data, batch_sizes, hx, weights, biases, layers, dropout, train, bidirectional);
  }
  return recurrent(data, hx[0], hx[1], weights, {kLstm, biases, layers, dropout, train, bidirectional, false},
                   sizes_in(batch_sizes));
}

using Padded = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, TensorList, bool, int64_t, double, bool, bool,
                                          bool);
using Packed = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, TensorList, bool, int64_t,
                                          double, bool, bool);

template <int64_t mode, Padded* torchs>
std::tuple<Tensor, Tensor> rnn(const Tensor& input, const Tensor& hx, TensorList weights, bool biases, int64_t layers,
                               double dropout, bool train, bool bidirectional, bool batch_first) {
  if (!recurrent_on_cudnn(input)) {
    return torchs(input, hx, weights, biases, layers, dropout, train, bidirectional, batch_first);
  }
  auto results = recurrent(input, hx, {}, weights, {mode, biases, layers, dropout, train, bidirectional, batch_first});
  return {std::get<0>(results), std::get<1>(results)};
}

template <int64_t mode, Packed* torchs>
std::tuple<Tensor, Tensor> rnn_packed(const Tensor& data, const Tensor& batch_sizes, const Tensor& hx,
                                      TensorList weights, bool biases, int64_t layers, double dropout, bool train,
                                      bool bidirectional) {
  if (!recurrent_on_cudnn(data)) {
    return torchs(data, batch_sizes, hx, weights, biases, layers, dropout, train, bidirectional);
  }
  auto results = recurrent(data, hx, {}, weights, {mode, biases, layers, dropout, train, bidirectional, false},
                           sizes_in(batch_sizes));
  return {std::get<0>(results), std::get<1>(results)};
}

// Moves the weights into one buffer; that they are changed is not in the operator's schema.
Tensor flatten_weight(TensorList weights, int64_t per_layer, int64_t input, int64_t mode, int64_t hidden,
                      int64_t projection, int64_t layers, bool batch_first, bool bidirectional) {
  const BelowAutograd below;
  Call call;
  for (const auto& w : weights) call.add(w, /*write=*/true, /*list=*/true);
  call.enter("aten::_cudnn_rnn_flatten_weight");
  auto buffer =
      at::_ops::_cudnn_rnn_flatten_weight::redispatch(native.dense, call.list(0, weights.size()), per_layer, input,
                                                      mode, hidden, projection, layers, batch_first, bidirectional);
  call.write_back();
  return call.result(std::move(buffer));
}

// Under autocast the layer runs in the lower precision; the weights' casts are what autograd sees, and the buffer's
// what cuDNN reads.
using RnnResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
RnnResult autocast_rnn(const Tensor& input, TensorList weights, int64_t per_layer, Optional buffer, const Tensor& hx,
                       Optional cx, int64_t mode, int64_t hidden, int64_t projection, int64_t layers, bool batch_first,
                       double dropout, bool train, bool bidirectional, at::IntArrayRef batch_sizes, Optional state) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastPrivateUse1);
  const auto type = at::autocast::get_autocast_dtype(kFlagos);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(type, t, kFlagos); };
  const auto lower = cast(weights);
  Tensor flat;
  if (buffer && buffer->defined()) {
    const at::NoGradGuard no_grad;
    const Layers kind{mode, per_layer > 3, layers, dropout, train, bidirectional, batch_first};
    bool fits = plain(input) && placing_of(lower, per_layer, input.size(-1), hidden, projection, kind).offsets ==
                                    placing_of(weights, per_layer, input.size(-1), hidden, projection, kind).offsets;
    if (fits) flat = buffer->to(type);
  }
  return at::_cudnn_rnn(cast(input), lower, per_layer, flat, cast(hx), cast(cx), mode, hidden, projection, layers,
                        batch_first, dropout, train, bidirectional, batch_sizes, state);
}

}  // namespace

void set_cuda_rnn(const CudaRnn& functions) { cuda_rnn = functions; }

void register_cudnn() {
  using c10::DispatchKey;
  const auto library = [](DispatchKey key) {
    return new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  };
  static auto* const below = library(DispatchKey::PrivateUse1);
  static auto* const autograd = library(DispatchKey::AutogradPrivateUse1);
  static auto* const autocast = library(DispatchKey::AutocastPrivateUse1);
  for (auto* l : {below, autograd}) {
    l->impl("_batch_norm_impl_index", TORCH_FN(batch_norm));
    l->impl("grid_sampler", TORCH_FN(grid_sampler));
    l->impl("ctc_loss.IntList", TORCH_FN(ctc_loss_of_lists));
    l->impl("ctc_loss.Tensor", TORCH_FN(ctc_loss_of_tensors));
    l->impl("lstm.input", TORCH_FN(lstm));
    l->impl("lstm.data", TORCH_FN(lstm_packed));
#define RNN(name, mode)                                              \
  l->impl(#name ".input", TORCH_FN((rnn<mode, &at::native::name>))); \
  l->impl(#name ".data", TORCH_FN((rnn_packed<mode, &at::native::name>)));
    RNN(gru, kGru)
    RNN(rnn_tanh, kTanh)
    RNN(rnn_relu, kRelu)
#undef RNN
  }
  below->impl("_cudnn_rnn_flatten_weight", TORCH_FN(flatten_weight));
  autocast->impl("_cudnn_rnn", TORCH_FN(autocast_rnn));
}

}  // namespace flagos
