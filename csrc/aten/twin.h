// twin.h: how one piece of memory carries two labels.
//
// Every flagos StorageImpl owns a twin StorageImpl over the same bytes with the native label. The flagos DataPtr's
// context *is* the strong reference to the twin and its deleter drops it, so the twin lives exactly as long as the
// memory. Views that a native kernel makes take their device from the twin; no StorageImpl ever changes its label after
// birth.
#pragma once

#include <c10/core/StorageImpl.h>

namespace flagos {

// A flagos-labelled DataPtr that owns `twin`.
c10::DataPtr label_twin(c10::intrusive_ptr<c10::StorageImpl> twin, c10::DeviceIndex index);

// A new flagos StorageImpl over `twin`.
c10::intrusive_ptr<c10::StorageImpl> flagos_storage(c10::intrusive_ptr<c10::StorageImpl> twin, c10::DeviceIndex index);

// The twin of a flagos storage. A storage whose DataPtr is not ours (from_blob, DLPack, copy-on-write) is adopted
// first: the twin takes its DataPtr over and a label of ours replaces it. Thread-safe.
c10::StorageImpl* twin_of(c10::StorageImpl* storage);

// Brings a flagos storage up to date after a kernel gave its twin other memory or another size. Every view of the
// storage sees the change.
void refresh_from_twin(c10::StorageImpl* storage, c10::StorageImpl* twin);

// Memory for a flagos storage on the current device, twin included.
c10::DataPtr allocate_flagos(size_t nbytes);

// The DataPtr that the chip's allocator handed out: the twin's, or `ptr` itself when the chip has no native label.
const c10::DataPtr& native_data_ptr(const c10::DataPtr& ptr);

// storage.resize_: keeps min(old, new) bytes, in the order of the current stream.
void resize_flagos_storage(c10::StorageImpl* storage, size_t nbytes);

// The allocator that flagos storages carry (the one registered for PrivateUse1).
c10::Allocator* flagos_allocator();

}  // namespace flagos
