// What csrc/replay and ghl_kernels/tapes/launches.py have of this library.
#pragma once

#include <cstdint>

#include "../abi.h"

constexpr int kGhlLaunchUnavailable = -1;  // no libcuda, or no context on this thread

GHL_EXPORT void ghl_launch_forget(void* planned);

// The driver's error, 0 for none; kGhlLaunchUnavailable where nothing was tried. addresses: of the
// tensors of this call. Planned launches are not changed: several threads may play one at a time.
GHL_EXPORT int ghl_launch_play(const void* planned, void* stream, const uint64_t* addresses);

GHL_EXPORT const char* ghl_launch_error(int error);
