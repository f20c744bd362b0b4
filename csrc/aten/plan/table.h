// table.h: the plans of one operator, by key, and what became of its calls.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <unordered_map>

#include "csrc/aten/plan/plan.h"
#include "csrc/runtime/spin_lock.h"

namespace flagos {

struct PlanCounts {
  uint64_t hits = 0, misses = 0, recorded = 0, plans = 0;
  uint64_t patched = 0;                     // hits of a plan that another value's calls were recorded for
  std::map<std::string, uint64_t> refused;  // reason -> calls that ran in Python because of it
  std::map<std::string, uint64_t> apart;    // reason -> times that two values of a number could not share a plan
};

class PlanTable {
 public:
  // A call's plan; settled: there is one, or it is known that there cannot be one.
  struct Found {
    std::shared_ptr<const Plan> plan;
    bool settled = false;
  };
  Found look_up(const PlanKey& key);
  // The plan alone; a call without one is not counted: it comes again.
  std::shared_ptr<const Plan> ready(const PlanKey& key);
  // Notes that a call without a plan has come. True when it is to be recorded: at the second sighting of its key, or of
  // one that differs in the values of numbers alone. The first one runs in Python alone, because it may compile and
  // tune. Every true is answered by recorded().
  bool sight(const PlanKey& key);
  // How a recording has ended: a plan, or a reason, or neither: the next call tries again.
  void recorded(const PlanKey& key, std::shared_ptr<const Plan> plan, const std::string& refused);
  // A plan turned out to be wrong.
  void refuse(const PlanKey& key, const std::string& reason);
  // A call that has no key.
  void count_refused(const std::string& reason);

  PlanCounts counts() const;
  void clear();

 private:
  static constexpr size_t kCapacity = 1024;

  struct Entry {
    enum State { kSeen, kRecording, kReady, kRefused } state = kSeen;
    PlanKey key;
    std::shared_ptr<const Plan> plan;
    std::string reason;
    uint64_t used = 0;
  };
  // Calls that differ in the values of numbers, not in their classes. When two of them are recorded and their plans
  // differ in nothing but parameters that follow the numbers, one plan serves all.
  struct Family {
    PlanKey key, first;  // `first`: the call that was recorded first
    std::shared_ptr<const Plan> first_plan, plan;
    std::vector<bool> free;  // per number: its value is put in; else it must be the first call's
    bool apart = false;      // no plan can serve all
  };
  Found find(const PlanKey& key, bool counted);
  void make_room();
  Family* family_of(const PlanKey& key, bool make);
  void join(const PlanKey& key, const std::shared_ptr<const Plan>& plan);

  mutable SpinLock lock_;                        // guards all below; nothing under it calls torch or Python
  std::unordered_map<uint64_t, Entry> entries_;  // by hash; of two keys with one hash the later has the place
  std::unordered_map<uint64_t, Family> families_;
  uint64_t clock_ = 0;
  PlanCounts counts_;
};

// Whether plans are used at all (FLAGOS_PLAN), and whether each replay is checked (FLAGOS_PLAN_VERIFY).
bool plans_on();
bool verifying_plans();
bool set_plans(bool on);  // returns the previous value
bool set_verifying_plans(bool on);

}  // namespace flagos
