// generator.h: the flagos generator: a thin face over the generator that the chip's kernels really use.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/GeneratorImpl.h>

#include "csrc/runtime/platform.h"

namespace flagos {

// What torch.Generator(device="flagos") holds. Kernels never see it: relabelling passes native_of() on.
struct FlagosGenerator final : c10::GeneratorImpl {
  FlagosGenerator(at::Generator native, c10::DeviceIndex index);

  void set_current_seed(uint64_t seed) override { native_.set_current_seed(seed); }
  void set_offset(uint64_t offset) override;
  uint64_t get_offset() const override;
  uint64_t current_seed() const override { return native_.current_seed(); }
  uint64_t seed() override { return native_.seed(); }
  void set_state(const c10::TensorImpl& state) override;
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override;
  void graphsafe_set_state(const c10::intrusive_ptr<c10::GeneratorImpl>& state) override;
  c10::intrusive_ptr<c10::GeneratorImpl> graphsafe_get_state() const override;
  static c10::DeviceType device_type() { return kFlagos; }

  const at::Generator& native() const { return native_; }

 protected:
  FlagosGenerator* clone_impl() const override;

 private:
  at::Generator native_;
};

// The generator behind a flagos one; undefined stays undefined. Any other device's is an error.
at::Generator native_of(const at::Generator& generator);

// The default generator of a device. Lives until the process ends.
const at::Generator& default_generator(c10::DeviceIndex index);

// A counter-based generator (seed, offset) for chips whose kernels take both as numbers.
at::Generator make_philox_generator(c10::DeviceIndex index);

}  // namespace flagos
