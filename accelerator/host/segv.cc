// segv.cc: turns a fault inside device memory into one line that names the cause. The handler is chained: it looks only
// at addresses of our pools, and in every case the previous action (core dump, faulthandler, ...) follows.
#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <mutex>

#include "host/fault.h"
#include "host/memory.h"

namespace flagos {
namespace host {
namespace {

struct sigaction g_previous;

// Only async-signal-safe calls are allowed here, so no printf.
class Line {
 public:
  Line& text(const char* s) {
    size_t n = strlen(s);
    if (length_ + n < sizeof(buffer_)) memcpy(buffer_ + length_, s, n), length_ += n;
    return *this;
  }
  Line& number(uintptr_t value, unsigned base) {
    char digits[24];
    int i = 23;
    digits[i] = '\0';
    do digits[--i] = "0123456789abcdef"[value % base];
    while (value /= base);
    return text(digits + i);
  }
  void write() {
    ssize_t ignored = ::write(2, buffer_, length_);
    (void)ignored;
  }

 private:
  char buffer_[400];
  size_t length_ = 0;
};

void describe(const void* address) {
  bool alias = false;
  int32_t device = device_of(address);
  if (device < 0) {
    device = device_of_alias(address);
    alias = true;
  }
  if (device < 0) return;
  uintptr_t value = reinterpret_cast<uintptr_t>(address);
  Line line;
  if (g_state.load() & kForked) {
    line.text("flagos: a forked child touched device memory of flagos:").number(device, 10).text(" at 0x");
    line.number(value, 16).text("; device memory is not shared with children, use the spawn start method\n");
  } else if (alias) {
    line.text("flagos: a kernel or copy used freed or out-of-bounds memory of flagos:").number(device, 10);
    line.text(" (device address 0x").number(value - reinterpret_cast<uintptr_t>(g_pools[device]->alias(nullptr)), 16);
    line.text(")\n");
  } else {
    line.text("flagos: the host touched device memory of flagos:").number(device, 10).text(" at 0x").number(value, 16);
    line.text("; copy it with .cpu() first (FLAGOS_HOST_PROTECT=0 turns this check off)\n");
  }
  line.write();
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (info->si_code > 0) describe(info->si_addr);  // not for a SIGSEGV that someone sent
  if ((g_previous.sa_flags & SA_SIGINFO) && g_previous.sa_sigaction) {
    g_previous.sa_sigaction(signal, info, context);
  } else if (g_previous.sa_handler != SIG_DFL && g_previous.sa_handler != SIG_IGN) {
    g_previous.sa_handler(signal);
  } else {
    sigaction(SIGSEGV, &g_previous, nullptr);  // the instruction runs again and the default action follows
  }
}

}  // namespace

void install_fault_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &g_previous);
  });
}

}  // namespace host
}  // namespace flagos
