// table.cc: see table.h.
#include "csrc/aten/plan/table.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "flagos.h"

namespace flagos {

PlanTable::Found PlanTable::look_up(const PlanKey& key) { return find(key, true); }
std::shared_ptr<const Plan> PlanTable::ready(const PlanKey& key) { return find(key, false).plan; }

PlanTable::Found PlanTable::find(const PlanKey& key, bool counted) {
  std::lock_guard<SpinLock> lock(lock_);
  const auto found = entries_.find(key.hash);
  if (C10_LIKELY(found != entries_.end() && found->second.key == key)) {
    auto& entry = found->second;
    entry.used = ++clock_;
    if (C10_LIKELY(entry.state == Entry::kReady)) {
      ++counts_.hits;
      return {entry.plan, true};
    }
    if (entry.state == Entry::kRefused) {
      if (counted) ++counts_.refused[entry.reason];
      return {nullptr, true};
    }
  }
  if (const auto* family = family_of(key, false);
      family && family->plan && (found == entries_.end() || found->second.state != Entry::kRefused)) {
    bool same = true;  // in what the plan does not put in
    for (size_t i = 0; i < key.scalars.size(); ++i) {
      const auto word = key.scalars[i].word;
      same &= family->free[i] || key.words[word] == family->first.words[word];
    }
    if (same) {
      ++counts_.hits;
      ++counts_.patched;
      return {family->plan, true};
    }
  }
  counts_.misses += counted;
  return {};
}

// Numbers are few among the operators' calls, and only calls without a plan of their own come here.
PlanTable::Family* PlanTable::family_of(const PlanKey& key, bool make) {
  if (key.scalars.empty()) return nullptr;
  auto family_key = key.family();
  const auto found = families_.find(family_key.hash);
  if (found != families_.end() && found->second.key == family_key) return &found->second;
  if (!make) return nullptr;
  if (families_.size() >= kCapacity) families_.clear();
  auto& family = families_[family_key.hash] = Family();
  family.key = std::move(family_key);
  return &family;
}

bool PlanTable::sight(const PlanKey& key) {
  std::lock_guard<SpinLock> lock(lock_);
  auto found = entries_.find(key.hash);
  if (found != entries_.end() && found->second.key == key) {
    auto& entry = found->second;
    const bool second = entry.state == Entry::kSeen;  // else another thread is at it
    if (second) entry.state = Entry::kRecording;
    return second;
  }
  make_room();
  auto& entry = entries_[key.hash];
  entry = Entry();
  entry.key = key;
  entry.used = ++clock_;
  const auto* family = family_of(key, false);
  const bool known = family != nullptr && !family->plan && !family->apart;
  if (known) {
    entry.state = Entry::kRecording;
  } else if (family == nullptr) {
    family_of(key, true);
  }
  return known;
}

void PlanTable::make_room() {
  if (entries_.size() < kCapacity) return;
  std::vector<uint64_t> ages;
  for (const auto& [hash, entry] : entries_) ages.push_back(entry.used);
  auto oldest = ages.begin() + static_cast<int64_t>(ages.size() / 8);
  std::nth_element(ages.begin(), oldest, ages.end());
  for (auto entry = entries_.begin(); entry != entries_.end();) {
    entry = entry->second.used <= *oldest && entry->second.state != Entry::kRecording ? entries_.erase(entry)
                                                                                      : std::next(entry);
  }
}

void PlanTable::recorded(const PlanKey& key, std::shared_ptr<const Plan> plan, const std::string& refused) {
  std::lock_guard<SpinLock> lock(lock_);
  if (plan) ++counts_.recorded;
  const auto found = entries_.find(key.hash);
  if (found == entries_.end() || !(found->second.key == key)) return;
  auto& entry = found->second;
  entry.state = plan ? Entry::kReady : refused.empty() ? Entry::kSeen : Entry::kRefused;
  entry.plan = std::move(plan);
  entry.reason = refused;
  if (!refused.empty()) ++counts_.refused[refused];
  if (entry.plan) return join(key, entry.plan);
  if (auto* family = family_of(key, false); family && !refused.empty()) family->apart = true;
}

void PlanTable::join(const PlanKey& key, const std::shared_ptr<const Plan>& plan) {
  auto* family = family_of(key, false);
  if (family == nullptr || family->plan || family->apart) return;
  if (!family->first_plan) {
    family->first = key;
    family->first_plan = plan;
    return;
  }
  if (family->first == key) return;
  std::string why;
  family->plan = merge_plans(*family->first_plan, family->first, *plan, key, family->free, why);
  family->apart = !family->plan;
  if (family->apart) ++counts_.apart[why];
  family->first_plan = nullptr;
}

void PlanTable::refuse(const PlanKey& key, const std::string& reason) {
  {
    std::lock_guard<SpinLock> lock(lock_);
    if (auto* family = family_of(key, false); family && family->plan) {
      family->plan = nullptr;
      family->apart = true;
    }
    auto& entry = entries_[key.hash];
    if (!(entry.key == key)) entry = Entry();
    entry.key = key;
    entry.used = ++clock_;
  }
  recorded(key, nullptr, reason);
}

void PlanTable::count_refused(const std::string& reason) {
  std::lock_guard<SpinLock> lock(lock_);
  ++counts_.refused[reason];
}

PlanCounts PlanTable::counts() const {
  std::lock_guard<SpinLock> lock(lock_);
  auto counts = counts_;
  for (const auto& [hash, entry] : entries_) counts.plans += entry.plan != nullptr;
  for (const auto& [hash, family] : families_) counts.plans += family.plan != nullptr;
  return counts;
}

void PlanTable::clear() {
  std::lock_guard<SpinLock> lock(lock_);
  entries_.clear();
  families_.clear();
  counts_ = PlanCounts();
}

namespace {

bool switched(const char* name, bool otherwise) {
  const char* value = flagos_env(name);
  if (value == nullptr || *value == 0) return otherwise;
  const std::string text = value;
  TORCH_CHECK_VALUE(text == "0" || text == "1" || text == "ON" || text == "OFF", name, "=", text, ": expected 1 or 0");
  return text == "1" || text == "ON";
}
std::atomic<bool>& on() {
  static std::atomic<bool> value{switched("FLAGOS_PLAN", true)};
  return value;
}
std::atomic<bool>& verifying() {
  static std::atomic<bool> value{switched("FLAGOS_PLAN_VERIFY", false)};
  return value;
}

}  // namespace

bool plans_on() { return on().load(std::memory_order_relaxed) && plan_backend() != nullptr; }
bool verifying_plans() { return verifying().load(std::memory_order_relaxed); }
bool set_plans(bool value) { return on().exchange(value); }
bool set_verifying_plans(bool value) { return verifying().exchange(value); }

}  // namespace flagos
