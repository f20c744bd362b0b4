// route.cc: the routing table: slots, backends, resolution, the slow path (route.h).
#include "csrc/aten/route.h"

#include <ATen/record_function.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <unordered_map>

#include "csrc/aten/decisions.h"
#include "csrc/aten/native.h"

namespace flagos {

namespace {

struct Table {
  std::mutex mutex;  // guards everything below; never held while a kernel runs
  std::map<std::string, Slot*, std::less<>> slots;
  std::map<std::string, std::vector<RouteLine>, std::less<>> wishes;  // conf and environment
  std::vector<BoxedFunction*> say_it_themselves;
  std::unordered_map<const void*, Slot*> boxed;  // operators without a typed route, by identity
};

Table& table() {
  static auto* const t = new Table;  // outlives every thread that may still call an operator
  return *t;
}

std::vector<Backend>& backends() {
  static auto* const list = new std::vector<Backend>;
  return *list;
}

// What makes calls unusual. Any of them turns the fast pointers off.
std::atomic<bool> logging{false};
std::atomic<bool> counting{false};
std::atomic<int> annotating{0};
std::atomic<int> sync_mode{0};
std::atomic<int> threads_with_routes{0};

std::atomic<uint64_t> editions{1};  // of conf and environment

struct ThreadRoutes {
  std::map<uint64_t, std::map<const Slot*, const Decision*>> frames;  // by what push returned; innermost last
  ~ThreadRoutes();
};
thread_local ThreadRoutes thread_routes;

bool usual() {
  return !logging.load(std::memory_order_relaxed) && !counting.load(std::memory_order_relaxed) &&
         annotating.load(std::memory_order_relaxed) == 0 && sync_mode.load(std::memory_order_relaxed) == 0 &&
         threads_with_routes.load(std::memory_order_relaxed) == 0;
}

void update_fast(Slot& slot) {
  const auto* decision = slot.decision.load(std::memory_order_acquire);
  const bool direct = usual() && decision && decision->resolution.error.empty() && !decision->screen;
  slot.fast.store(direct ? decision->kernel.typed : nullptr, std::memory_order_release);
}

// Changes one of them and then every fast pointer, so that two threads cannot leave them at odds.
template <class Change>
auto change_usual(Change change) {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  const bool was_usual = usual();
  const auto before = change();
  if (usual() != was_usual) {
    for (auto& [name, slot] : t.slots) update_fast(*slot);
  }
  return before;
}

ThreadRoutes::~ThreadRoutes() {  // a thread may end inside of them
  if (!frames.empty()) change_usual([&] { return threads_with_routes.fetch_sub(static_cast<int>(frames.size())); });
}

std::vector<Candidate> candidates_of(const Slot& slot, std::vector<Kernel>& kernels) {
  std::vector<Candidate> candidates;
  for (const auto& backend : backends()) {
    Candidate candidate;
    candidate.backend = backend.name;
    Kernel kernel;
    if (backend.available(candidate.why)) kernel = backend.kernel(slot, candidate.why);
    if (!kernel && candidate.why.empty()) continue;  // not a backend for operators of this kind
    candidate.usable = static_cast<bool>(kernel);
    candidate.by_name_only = kernel.by_name_only;
    candidates.push_back(std::move(candidate));
    kernels.push_back(kernel);
  }
  return candidates;
}

struct BoxedCall final : c10::OperatorKernel {
  explicit BoxedCall(const Kernel& k) : kernel(k) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const auto* other = kernel.instead ? kernel.instead(op, *stack) : nullptr;
    if (other) return pass_on(*other, op, keys, stack);
    kernel.boxed(op, keys, stack);
  }
  const Kernel kernel;
};

bool same(const Resolution& a, const Resolution& b) {
  const auto equal = [](const Step& x, const Step& y) {
    return x.backend == y.backend && x.chosen == y.chosen && x.reason == y.reason;
  };
  return a.backend == b.backend && a.origin == b.origin && a.error == b.error &&
         std::equal(a.steps.begin(), a.steps.end(), b.steps.begin(), b.steps.end(), equal);
}

// What explain() says of the lines after the first.
std::string others(const std::vector<RouteLine>& lines) {
  std::string text;
  for (size_t i = 1; i < lines.size(); ++i) {
    text += "; others " + lines[i].backend;
    if (!lines[i].within.text.empty()) text += " within " + lines[i].within.text;
    text += " (" + lines[i].origin + ")";
  }
  return text;
}

// The decision for a slot and its lines; an equal earlier one is used again, so that switching back and forth costs no
// memory.
const Decision* decide(Slot& slot, std::vector<RouteLine> lines) {
  std::optional<RouteLine> wish;
  if (!lines.empty()) {
    if (lines.front().backend == "native") lines.front().backend = native_name(slot);
    wish = lines.front();
  }
  std::vector<Kernel> kernels;
  const auto candidates = candidates_of(slot, kernels);
  auto resolution = resolve(slot.name, wish, candidates);
  for (auto& step : resolution.steps) {
    if (step.chosen) step.reason += others(lines);
  }
  for (const auto& known : slot.decisions) {
    if (same(known->resolution, resolution)) return known.get();
  }
  auto decision = std::make_unique<Decision>(slot);
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (candidates[i].backend == resolution.backend && !resolution.backend.empty()) decision->kernel = kernels[i];
  }
  if (decision->kernel && wish && !wish->within.text.empty()) decision->screen = conditions(slot, lines);
  if (decision->kernel.boxed) {
    decision->boxed = c10::BoxedKernel::makeFromFunctor(std::make_unique<BoxedCall>(decision->kernel));
  }
  decision->resolution = std::move(resolution);
  slot.decisions.push_back(std::move(decision));
  return slot.decisions.back().get();
}

void settle(Slot& slot) {
  std::vector<RouteLine> lines;
  if (slot.wish_api) {
    lines = {*slot.wish_api};
  } else if (slot.wish) {
    lines = table().wishes.at(slot.name);
  }
  slot.decision.store(decide(slot, std::move(lines)), std::memory_order_release);
  update_fast(slot);
}

void check_name(const std::string& name) {
  if (!std::binary_search(operator_names().begin(), operator_names().end(), name)) {
    const auto near = nearest(name.compare(0, 6, "aten::") == 0 ? name.substr(6) : name, operator_names());
    throw ConfigError("unknown operator '" + name + "'" + (near.empty() ? "" : "; did you mean '" + near + "'?"));
  }
}

// explain() of an operator without a slot: who serves it, and why no backend is asked.
Resolution unrouted(const std::string& name) {
  const auto op = operator_named(name);
  Slot slot;  // what a backend would see
  slot.name = name;
  slot.op = op;
  Resolution result;
  result.origin = "default";
  result.steps.push_back(served_without_route(op));
  if (!op) return result;
  std::vector<Kernel> kernels;
  for (auto& candidate : candidates_of(slot, kernels)) {
    if (candidate.usable) candidate.why = "it would not be asked" + (candidate.why.empty() ? "" : ": " + candidate.why);
    result.steps.push_back({candidate.backend, false, candidate.why});
  }
  return result;
}

Slot& slot_named(Table& t, const std::string& name) {
  const auto found = t.slots.find(name);
  if (found != t.slots.end()) return *found->second;
  check_name(name);
  throw ConfigError("operator '" + name + "' has no route: " + unrouted(name).steps.front().reason);
}

// The result's size or a number of it has to be known on the host.
bool synchronizes(const Slot& slot) {
  return slot.op && (slot.op->hasTag(at::Tag::dynamic_output_shape) || slot.op->hasTag(at::Tag::data_dependent_output));
}

std::unique_ptr<at::RecordFunction> range_of(const Slot& slot, const std::string& backend) {
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE);
  if (!callbacks) return nullptr;  // no profiler
  auto range = std::make_unique<at::RecordFunction>(std::move(*callbacks));
  range->before("flagos::" + slot.name + "[" + backend + "]");
  return range;
}

Slot& slot_of_boxed(const c10::OperatorHandle& op) {
  const void* identity = &op.operator_name();
  thread_local std::unordered_map<const void*, Slot*> known;
  auto& mine = known[identity];
  if (C10_LIKELY(mine != nullptr)) return *mine;
  auto& t = table();
  std::unique_lock<std::mutex> lock(t.mutex);
  auto& slot = t.boxed[identity];
  if (!slot) {
    auto* fresh = new Slot;
    fresh->name = plain_name(op.operator_name());
    slot = fresh;
    lock.unlock();
    add_slot(*fresh, op);
  }
  return *(mine = slot);
}

}  // namespace

bool register_backend(Backend backend) {
  auto& list = backends();
  const auto at = std::upper_bound(list.begin(), list.end(), backend,
                                   [](const Backend& a, const Backend& b) { return a.rank < b.rank; });
  list.insert(at, std::move(backend));
  return true;
}

std::string native_name(const Slot& slot) { return slot.compose ? "composite" : platform().chip(); }

Slot& slot_of(const c10::OperatorHandle& op) {
  auto& t = table();
  {
    std::lock_guard<std::mutex> lock(t.mutex);
    const auto found = t.slots.find(plain_name(op.operator_name()));
    if (found != t.slots.end()) return *found->second;
  }
  return slot_of_boxed(op);
}

const Decision& decide_without(Slot& slot, const std::string& backend) {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  for (const auto& other : backends()) {
    std::string why;
    if (other.name == backend || !other.available(why)) continue;
    const auto kernel = other.kernel(slot, why);
    if (!kernel || kernel.by_name_only) continue;
    return *decide(slot, {RouteLine{slot.name, other.name, "passed on by the route to " + backend, {}}});
  }
  TORCH_CHECK(false, "flagos: the ", backend, " kernel of ", slot.name, " calls ", slot.name,
              " again, and no other backend has a kernel for it");
}

const Decision& decide_lines(Slot& slot, const std::vector<RouteLine>& lines) {
  std::lock_guard<std::mutex> lock(table().mutex);
  return *decide(slot, lines);
}

uint64_t edition() { return editions.load(std::memory_order_acquire); }

bool watched() { return logging.load(std::memory_order_relaxed) || counting.load(std::memory_order_relaxed); }

void says_itself(BoxedFunction* function) { table().say_it_themselves.push_back(function); }

void log_dispatch(const std::string& op, const std::string& backend) {
  if (C10_LIKELY(!logging.load(std::memory_order_relaxed))) return;
  std::fprintf(stderr, "[flagos dispatch] %s -> %s\n", op.c_str(), backend.c_str());
}

void announce(const Decision& decision) {
  if (C10_LIKELY(!logging.load(std::memory_order_relaxed))) return;
  const auto& themselves = table().say_it_themselves;
  const auto& kernel = decision.kernel;
  if (kernel.composed || std::count(themselves.begin(), themselves.end(), kernel.boxed)) return;
  log_dispatch(decision.slot.name, decision.resolution.backend);
}

const Decision& take_slow_path(Slot& slot) {
  const Decision* decision = nullptr;
  for (auto frame = thread_routes.frames.rbegin(); frame != thread_routes.frames.rend() && !decision; ++frame) {
    const auto own = frame->second.find(&slot);
    if (own != frame->second.end()) decision = own->second;
  }
  if (!decision) decision = slot.decision.load(std::memory_order_acquire);
  TORCH_INTERNAL_ASSERT(decision, "flagos: ", slot.name, " was called before torch_fl finished its import");
  const auto& resolution = decision->resolution;
  TORCH_CHECK_NOT_IMPLEMENTED(resolution.error.empty() || resolution.origin != "default", "Could not run '",
                              slot.op ? c10::toString(slot.op->operator_name()) : slot.name, "' on flagos (",
                              platform().chip(), "): ", resolution.error, "; torch_fl.explain('", slot.name,
                              "') shows what was tried");
  TORCH_CHECK(resolution.error.empty(), "flagos: ", resolution.error);
  if (!decision->screen) announce(*decision);
  if (sync_mode.load(std::memory_order_relaxed) && synchronizes(slot)) report_synchronizing(slot.name);
  return *decision;
}

SlowCall::SlowCall(Slot& slot) : decision_(take_slow_path(slot)), counted_(decision_) {
  if (annotating.load(std::memory_order_relaxed)) range_ = range_of(slot, decision_.resolution.backend);
}

SlowCall::~SlowCall() = default;

void boxed_route(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  auto& slot = slot_of_boxed(op);
  remember_op(slot.name);
  const SlowCall slow(slot);
  call_decision(slow.decision(), op, keys, stack);
}

// ---- counting ------------------------------------------------------------------------------------------------------

namespace {

thread_local Counted* current_call = nullptr;

uint64_t now() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

}  // namespace

Counted::Counted(const Decision& decision) {
  if (C10_LIKELY(!counting.load(std::memory_order_relaxed))) return;
  decision_ = decision.kernel.composed ? nullptr : &decision;
  outer_ = std::exchange(current_call, this);
  start_ = now();
}

Counted::~Counted() {
  if (C10_LIKELY(!start_)) return;
  const auto elapsed = now() - start_;
  if (decision_) {
    decision_->calls.fetch_add(1, std::memory_order_relaxed);
    decision_->nanoseconds.fetch_add(elapsed - std::min(elapsed, nested_), std::memory_order_relaxed);
  }
  current_call = outer_;
  if (outer_) outer_->nested_ += decision_ ? elapsed : nested_;  // a composition's own time is its caller's
}

void served_by(const Decision& decision) {
  if (current_call) current_call->decision_ = decision.kernel.composed ? nullptr : &decision;
}

void add_slot(Slot& slot, const c10::OperatorHandle& op) {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  slot.op = op;
  t.slots.emplace(slot.name, &slot);
  const auto wish = t.wishes.find(slot.name);
  if (wish != t.wishes.end()) slot.wish = wish->second.front();
  settle(slot);
}

void configure(const std::vector<RouteLine>& lines) {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  t.wishes.clear();
  for (const auto& line : lines) t.wishes[line.op].push_back(line);
  editions.fetch_add(1, std::memory_order_release);
  for (auto& [name, slot] : t.slots) {
    const auto wish = t.wishes.find(name);
    slot->wish = wish == t.wishes.end() ? std::nullopt : std::optional<RouteLine>(wish->second.front());
    settle(*slot);
  }
}

void set_route(const RouteLine& line) {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  auto& slot = slot_named(t, line.op);
  slot.wish_api = line.backend.empty() ? std::nullopt : std::optional<RouteLine>(line);
  settle(slot);
}

uint64_t push_thread_routes(const std::vector<RouteLine>& lines) {
  auto& t = table();
  std::map<const Slot*, const Decision*> frame;
  {
    std::lock_guard<std::mutex> lock(t.mutex);
    for (const auto& line : lines) {
      auto& slot = slot_named(t, line.op);
      frame.emplace(&slot, decide(slot, {line}));
    }
  }
  static std::atomic<uint64_t> count{0};
  const auto pushed = ++count;
  thread_routes.frames.emplace(pushed, std::move(frame));
  change_usual([] { return threads_with_routes.fetch_add(1); });
  return pushed;
}

void pop_thread_routes(uint64_t pushed) {
  TORCH_CHECK(thread_routes.frames.erase(pushed) == 1, "flagos: routes are left on the thread that entered them");
  change_usual([] { return threads_with_routes.fetch_sub(1); });
}

std::vector<RouteView> routes() {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  std::vector<RouteView> all;
  for (const auto& [name, slot] : t.slots) {
    const auto& r = slot->decision.load()->resolution;
    std::string reason = r.error;
    for (const auto& step : r.steps) {
      if (step.chosen) reason = step.reason;
    }
    all.push_back({name, r.backend, r.origin, reason});
  }
  return all;
}

Resolution explain(const std::string& op) {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  if (const auto found = t.slots.find(op); found != t.slots.end()) return found->second->decision.load()->resolution;
  check_name(op);
  return unrouted(op);
}

std::vector<Candidate> candidates(const std::string& op, std::string& native_backend) {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  const auto& slot = slot_named(t, op);
  native_backend = native_name(slot);
  std::vector<Kernel> kernels;
  return candidates_of(slot, kernels);
}

std::vector<CallCount> call_counts() {
  auto& t = table();
  std::lock_guard<std::mutex> lock(t.mutex);
  std::vector<CallCount> counts;
  for (const auto& [name, slot] : t.slots) {
    for (const auto& decision : slot->decisions) {
      const auto calls = decision->calls.load(std::memory_order_relaxed);
      const auto nanoseconds = decision->nanoseconds.load(std::memory_order_relaxed);
      if (calls) counts.push_back({name, decision->resolution.backend, calls, nanoseconds});
    }
  }
  return counts;
}

bool set_logging(bool on) {
  return change_usual([on] { return logging.exchange(on); });
}

void set_annotating(bool on) {
  change_usual([on] { return annotating.fetch_add(on ? 1 : -1); });
}

void set_sync_debug_mode(int mode) {
  change_usual([mode] { return sync_mode.exchange(mode); });
}

int sync_debug_mode() { return sync_mode.load(std::memory_order_relaxed); }

void report_synchronizing(const std::string& op) {
  const std::string text = "flagos: " + op + " makes the host wait for the device (sync debug mode)";
  TORCH_CHECK(sync_debug_mode() != 2, text,
              "; keep the value on the device, or copy it with non_blocking=True from or to pinned memory");
  TORCH_WARN(text);
}

bool set_counting(bool on) {
  return change_usual([on] {
    const bool before = counting.exchange(on);
    if (on && !before) {
      for (auto& [name, slot] : table().slots) {
        for (auto& decision : slot->decisions) decision->calls.store(0), decision->nanoseconds.store(0);
      }
    }
    return before;
  });
}

}  // namespace flagos
