// The kernel's calls on where memory lies, without libnuma, and the time of one dependent read.
#pragma once

#include <cstdint>
#include <vector>

namespace hybridgen {

// All return 0 or the errno; none throws. Addresses are multiples of the system's page.

// mbind(2): `mode` is one of the MPOL_* numbers; `nodes` may be empty where the mode allows it.
int set_policy(uintptr_t address, int64_t bytes, int mode, const std::vector<int32_t>& nodes);

// move_pages(2) on this process. `nodes` null: asks only. A status is a node, or a negative errno: -ENOENT where
// nothing was ever written. `num_left` is how many pages the kernel says it gave up on, whose statuses it leaves alone.
int move_pages(const uintptr_t* addresses, int64_t count, const int32_t* nodes, int32_t* status, int64_t* num_left);

int advise(uintptr_t address, int64_t bytes, int advice);

// mlock2(2) with MLOCK_ONFAULT: what is there stays, and what comes will, without being made to come.
int lock_on_fault(uintptr_t address, int64_t bytes);
int unlock(uintptr_t address, int64_t bytes);

// Seconds of one read that the next one's address depends on: the mean of `num_reads` over lines in random order, one from
// each of as many equal parts of the buffer, each read once and none of them in a cache before. Overwrites the buffer.
double chase(uintptr_t address, int64_t bytes, int64_t num_reads);

}  // namespace hybridgen
