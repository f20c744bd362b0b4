/* sim.h: driving the simulated device of the host chip from tests. C ABI, exported by libflagos.so. */
#ifndef FLAGOS_HOST_SIM_H_
#define FLAGOS_HOST_SIM_H_

#include "flagos.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Replaces the fault plan: items ENTRY@N=STATUS separated by ';', where ENTRY is a name of the HAL table and N counts
 * that entry's calls from 1 since the plan was set; NULL or "" is no plan. DEVICE_LOST stays with the device of that
 * call until the next flagos_sim_set_fail. Resets the call counters. A malformed plan changes nothing. */
FLAGOS_EXPORT flagos_status flagos_sim_set_fail(const char* plan);

/* How often an entry was called since the start or the last flagos_sim_set_fail; 0 for an unknown name. Calls that
 * were refused (before init, after fork) are not counted. */
FLAGOS_EXPORT uint64_t flagos_sim_calls(const char* entry);

/* Seeds the random delays (0 to 2 ms, one task in four) of stream tasks; 0 switches them off. */
FLAGOS_EXPORT void flagos_sim_set_chaos(uint64_t seed);

/* Live allocations of a device: how many, and the bytes that were asked for. */
FLAGOS_EXPORT flagos_status flagos_sim_live(int device, uint64_t* blocks, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif /* FLAGOS_HOST_SIM_H_ */
