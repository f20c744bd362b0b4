// generator.cc: the flagos generator, its default instances, and the state of counter-based generators.
#include "csrc/runtime/generator.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <memory>
#include <mutex>

namespace flagos {

FlagosGenerator::FlagosGenerator(at::Generator native, c10::DeviceIndex index)
    : c10::GeneratorImpl(flagos_device(index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
      native_(std::move(native)) {}

// The simulated chip's numbers are a CPU generator's, which has no offset. Pickling a generator asks for it.
uint64_t FlagosGenerator::get_offset() const { return native_.device().type() == c10::kCPU ? 0 : native_.get_offset(); }
void FlagosGenerator::set_offset(uint64_t offset) {
  if (native_.device().type() != c10::kCPU) return native_.set_offset(offset);
  TORCH_CHECK(offset == 0, "flagos: generators of the chip ", platform().chip(), " have no offset, so it cannot be ",
              offset, "; set_state() takes what get_state() gave");
}

void FlagosGenerator::set_state(const c10::TensorImpl& state) { native_.unsafeGetGeneratorImpl()->set_state(state); }

c10::intrusive_ptr<c10::TensorImpl> FlagosGenerator::get_state() const {
  return native_.unsafeGetGeneratorImpl()->get_state();
}

void FlagosGenerator::graphsafe_set_state(const c10::intrusive_ptr<c10::GeneratorImpl>& state) {
  const auto* other = dynamic_cast<FlagosGenerator*>(state.get());
  TORCH_CHECK(other != nullptr, "Expected a 'flagos' generator state but found one of another device");
  native_.unsafeGetGeneratorImpl()->graphsafe_set_state(other->native_.getIntrusivePtr());
}

c10::intrusive_ptr<c10::GeneratorImpl> FlagosGenerator::graphsafe_get_state() const {
  return c10::make_intrusive<FlagosGenerator>(at::Generator(native_.unsafeGetGeneratorImpl()->graphsafe_get_state()),
                                              device_.index());
}

FlagosGenerator* FlagosGenerator::clone_impl() const { return new FlagosGenerator(native_.clone(), device_.index()); }

at::Generator native_of(const at::Generator& generator) {
  if (!generator.defined()) return generator;
  const auto* flagos = dynamic_cast<FlagosGenerator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(flagos != nullptr, "Expected a 'flagos' device type for generator but found '", generator.device().type(),
              "'");
  return flagos->native();
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static auto& generators = *new std::vector<at::Generator>(platform().device_count());
  static auto& once = *new std::vector<std::once_flag>(platform().device_count());
  const auto i = checked_index(index);
  std::call_once(
      once[i], [i] { generators[i] = at::make_generator<FlagosGenerator>(platform().native_generator(i, false), i); });
  return generators[i];
}

namespace {

// Seed and offset; a kernel takes both and moves the offset on by what it used.
struct PhiloxGenerator final : c10::GeneratorImpl {
  explicit PhiloxGenerator(c10::DeviceIndex index)
      : c10::GeneratorImpl(flagos_device(index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  void set_current_seed(uint64_t seed) override {
    state_[0] = seed;
    state_[1] = 0;
  }
  void set_offset(uint64_t offset) override { state_[1] = offset; }
  uint64_t get_offset() const override { return state_[1]; }
  uint64_t current_seed() const override { return state_[0]; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return state_[0];
  }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.device_type() == c10::kCPU && state.dtype() == caffe2::TypeMeta::Make<uint8_t>() &&
                    state.is_contiguous() && state.numel() == static_cast<int64_t>(sizeof(state_)),
                "RNG state must be a torch.ByteTensor of ", sizeof(state_), " bytes on the CPU");
    std::memcpy(state_, state.data(), sizeof(state_));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::empty({sizeof(state_)}, at::TensorOptions().dtype(at::kByte).device(at::kCPU));
    std::memcpy(state.mutable_data_ptr(), state_, sizeof(state_));
    return state.getIntrusivePtr();
  }
  void graphsafe_set_state(const c10::intrusive_ptr<c10::GeneratorImpl>& other) override {
    const auto* philox = dynamic_cast<PhiloxGenerator*>(other.get());
    TORCH_CHECK(philox != nullptr, "Expected the state of a counter-based generator");
    std::memcpy(state_, philox->state_, sizeof(state_));
  }
  c10::intrusive_ptr<c10::GeneratorImpl> graphsafe_get_state() const override {
    return c10::intrusive_ptr<c10::GeneratorImpl>::reclaim(clone_impl());
  }
  static c10::DeviceType device_type() { return kFlagos; }

 protected:
  PhiloxGenerator* clone_impl() const override {
    auto* copy = new PhiloxGenerator(device_.index());
    std::memcpy(copy->state_, state_, sizeof(state_));
    return copy;
  }

 private:
  uint64_t state_[2] = {c10::default_rng_seed_val, 0};
};

}  // namespace

at::Generator make_philox_generator(c10::DeviceIndex index) { return at::make_generator<PhiloxGenerator>(index); }

}  // namespace flagos
