// What the pretend CUDA runtime offers beside CUDA's own functions.
#pragma once

#include <cstddef>

// A kernel's host twin: pointers to its arguments, grid and block (as dim3*), blocks of a cluster, bytes of dynamic
// shared memory.
using pretend_kernel = void (*)(void** arguments, const void* grid, const void* block, unsigned cluster,
                                size_t dynamic);

struct pretend_launch {
  const char* kernel;  // as nvcc mangles it
  int device;
  void* stream;  // null: the default one
  unsigned grid, block, cluster;
  size_t dynamic;
};

extern "C" {
// From now on a launch of the kernel of this (mangled) name runs its twin; `sizes` are those of its parameters.
void pretend_twin(const char* name, pretend_kernel twin, const size_t* sizes, size_t count);
// Hands out the launches since the last call, oldest first, at most `capacity`, and forgets them all.
size_t pretend_launches(pretend_launch* to, size_t capacity);
// A function of the host that runs in the stream's turn and may touch memory of its device.
int pretend_run(void (*function)(void*), void* data, void* stream);
// Runs all that a stream has to do, as cudaStreamSynchronize does.
int pretend_wait(void* stream);
// While open, the host may touch the devices' memory.
void pretend_open(int open);
}
