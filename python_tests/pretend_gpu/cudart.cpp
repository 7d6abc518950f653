// A pretend CUDA runtime, in the place of libcudart.so.13: two devices whose memory is the host's, streams that are
// queues, graphs that record. A kernel runs where a *twin* of it is known: the same source, compiled for the host. So
// all that torch and the package do on the host's side of CUDA runs as it is: allocate, choose a device and a stream,
// launch, capture.
//
// PRETEND_ORDER      lazy (default): work runs when somebody waits for it, which shows what nobody waited for
//                    eager: at once, but for streams that torch.cuda._sleep put to sleep, which shows what overtakes
// PRETEND_ALLOCATOR  protected (default): a device's memory can be touched by copies and by its own kernels, and by
//                    nothing else
//                    malloc: for AddressSanitizer
//
// Functions that are not here are not needed by what the tests do: calling one ends the process with its name.
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pretend.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kDevices = 2;
constexpr size_t kMemory = size_t(80) << 30;  // of each device
// As an H100 has it.
constexpr int kMultiprocessors = 132, kShared = 48 << 10, kSharedOptIn = 227 << 10, kSharedStatic = 1 << 10;

bool is_set(const char* name, const char* value) {
  const char* const given = std::getenv(name);
  return given && std::strcmp(given, value) == 0;
}
const bool kEager = is_set("PRETEND_ORDER", "eager");
const bool kProtect = !is_set("PRETEND_ALLOCATOR", "malloc");

// One lock for everything: tasks run under it, and call the runtime again.
struct Lock {
  static std::recursive_mutex& mutex() {
    static auto* const the_mutex = new std::recursive_mutex;
    return *the_mutex;
  }
  std::lock_guard<std::recursive_mutex> guard{mutex()};
};

thread_local int current_device = 0;

// --- errors ----------------------------------------------------------------------------------------------------------

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_text;

cudaError_t fail(cudaError_t error, const std::string& text = "") {
  last_text = text;
  return last_error = error;
}

[[noreturn]] void die(const std::string& text) {
  std::fprintf(stderr, "pretend CUDA: %s\n", text.c_str());
  std::abort();
}

// --- memory ----------------------------------------------------------------------------------------------------------

constexpr int kHost = -1;

struct Block {
  size_t size, mapped;
  int device;
  bool open;
};
auto& blocks = *new std::map<char*, Block>;
size_t used[kDevices];

std::pair<char* const, Block>* find(const void* p) {
  auto next = blocks.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (next == blocks.begin()) return nullptr;
  auto& [begin, block] = *std::prev(next);
  return static_cast<const char*>(p) < begin + block.size ? &*std::prev(next) : nullptr;
}
bool on_device(const void* p) {
  const auto* block = find(p);
  return block && block->second.device != kHost;
}

// Whose memory may be touched now: one device's, everybody's or nobody's.
constexpr int kNobody = -1, kEverybody = -2;
int opened = kNobody;

void open_memory(int whose) {
  if (!kProtect || whose == opened) return;
  opened = whose;
  for (auto& [p, block] : blocks) {
    if (block.device == kHost) continue;
    const bool open = whose == kEverybody || whose == block.device;
    if (open != block.open) mprotect(p, block.mapped, open ? PROT_READ | PROT_WRITE : PROT_NONE);
    block.open = open;
  }
}
struct RestoreMemory {
  const int before = opened;
  ~RestoreMemory() { open_memory(before); }
};

void on_fault(int, siginfo_t* info, void*) {
  const auto* block = find(info->si_addr);
  if (block) {
    std::fprintf(stderr, "pretend CUDA: memory of device %d touched by %s\n", block->second.device,
                 opened == kNobody ? "the host" : "a kernel of another device");
  } else {
    std::fprintf(stderr, "pretend CUDA: segmentation fault at %p\n", info->si_addr);
  }
  signal(SIGSEGV, SIG_DFL);  // the same access again ends the process
}
const int catch_faults = [] {
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  return kProtect ? sigaction(SIGSEGV, &action, nullptr) : 0;
}();

cudaError_t allocate(void** p, size_t size, int device) {
  *p = nullptr;
  if (size == 0) return cudaSuccess;
  if (device != kHost && used[device] + size > kMemory) return fail(cudaErrorMemoryAllocation);
  size_t mapped = 0;
  if (kProtect && device != kHost) {
    mapped = (size + 4095) / 4096 * 4096;
    *p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  } else if (posix_memalign(p, 512, size)) {
    return fail(cudaErrorMemoryAllocation);
  }
  if (size <= (4 << 20)) std::memset(*p, 0xff, size);  // NaN: nobody may count on zeros
  const bool open = !mapped || opened == kEverybody || opened == device;
  if (!open) mprotect(*p, mapped, PROT_NONE);
  blocks[static_cast<char*>(*p)] = {size, mapped, device, open};
  if (device != kHost) used[device] += size;
  return cudaSuccess;
}

cudaError_t release(void* p) {
  if (!p) return cudaSuccess;
  const auto it = blocks.find(static_cast<char*>(p));
  if (it == blocks.end()) return fail(cudaErrorInvalidValue);
  const Block block = it->second;
  blocks.erase(it);
  if (block.device != kHost) used[block.device] -= block.size;
  if (block.mapped) {
    munmap(p, block.mapped);
  } else {
    std::free(p);
  }
  return cudaSuccess;
}

// --- streams, events, graphs -----------------------------------------------------------------------------------------

struct Stream;
struct Task {
  std::function<void()> run;
  Stream* after = nullptr;  // instead: wait until this stream has done so many tasks
  uint64_t count = 0;
};
struct Graph {
  std::vector<std::function<void()>> tasks;
};
struct Capture {
  unsigned long long id;
  Graph* graph;
  Stream* origin;
  bool valid = true;
};
struct Stream {
  int device, priority = 0;
  std::deque<Task> queue;
  uint64_t enqueued = 0, done = 0;
  std::shared_ptr<Capture> capture;
  bool asleep = false;  // torch.cuda._sleep: runs nothing before somebody waits for it
};
struct Event {
  Stream* stream = nullptr;
  uint64_t count = 0;
  std::shared_ptr<Capture> capture;
  std::chrono::steady_clock::time_point time{};
};
auto& streams = *new std::vector<Stream*>;  // kept for ever, as events point to them

Stream* default_stream(int device) {
  static Stream* all[kDevices];
  if (!all[device]) streams.push_back(all[device] = new Stream{device});
  return all[device];
}
// Three handles stand for the default stream of the current device.
Stream* stream_of(const void* handle) {
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return default_stream(current_device);
  return static_cast<Stream*>(const_cast<void*>(handle));
}

void drain(Stream* s, uint64_t count) {
  const RestoreMemory restore;  // once, at the end of all tasks
  while (s->done < count) {
    const Task task = std::move(s->queue.front());
    s->queue.pop_front();
    if (task.after) drain(task.after, task.count);
    if (task.run) task.run();
    ++s->done;
  }
  if (s->queue.empty()) s->asleep = false;
}
void drain(Stream* s) { drain(s, s->enqueued); }

void drain_device(int device) {
  static std::mt19937 random;
  std::vector<Stream*> all;
  std::copy_if(streams.begin(), streams.end(), std::back_inserter(all), [&](Stream* s) { return s->device == device; });
  std::shuffle(all.begin(), all.end(), random);
  for (Stream* s : all) drain(s);
}

void push(Stream* s, Task task) {
  s->queue.push_back(std::move(task));
  ++s->enqueued;
  if (kEager && !s->asleep) drain(s);
}

// `whose`: the memory that it touches.
void enqueue(Stream* s, int whose, std::function<void()> run) {
  const auto task = [=] {
    open_memory(whose);
    run();
  };
  if (s->capture) {
    s->capture->graph->tasks.push_back(task);
  } else {
    push(s, {task});
  }
}

// What may not be done while a stream is captured.
cudaError_t not_captured(Stream* s) {
  if (!s->capture) return cudaSuccess;
  s->capture->valid = false;
  return fail(cudaErrorStreamCaptureUnsupported);
}
cudaError_t nothing_captured() {
  for (Stream* s : streams) {
    if (s->capture) return not_captured(s);
  }
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t bytes, Stream* s) {
  if (bytes == 0) return cudaSuccess;
  if (!find(from) && on_device(to)) {  // from memory that is not pinned: staged, so that it may change at once
    const auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
    enqueue(s, kEverybody, [=] { std::memcpy(to, staged->data(), bytes); });
    return cudaSuccess;
  }
  const bool waits = !find(to);
  if (waits && s->capture) return not_captured(s);
  enqueue(s, kEverybody, [=] { std::memmove(to, from, bytes); });
  if (waits) drain(s);
  return cudaSuccess;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

struct Twin {
  pretend_kernel call;
  std::vector<size_t> sizes;
};
auto& names = *new std::unordered_map<const void*, const char*>;  // of the host's function: mangled
auto& twins = *new std::unordered_map<std::string, Twin>;
auto& launches = *new std::vector<pretend_launch>;
auto& shared_limits = *new std::map<std::pair<const void*, int>, size_t>;  // dynamic, of a kernel on a device

std::string demangled(const char* name) {
  int status;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : name;
}

// "vtw::kernel<float>": without the parameters, which nvcc and g++ do not always mangle alike.
std::string short_name(const char* name) {
  std::string text = demangled(name);
  constexpr char anonymous[] = "(anonymous namespace)";
  for (size_t at; (at = text.find(anonymous)) != std::string::npos;)
    text.replace(at, sizeof anonymous - 1, "anonymous");
  size_t begin = 0;
  for (size_t i = 0, depth = 0; i < text.size(); ++i) {
    if (text[i] == '<') ++depth;
    if (text[i] == '>') --depth;
    if (depth == 0 && text[i] == ' ') begin = i + 1;  // after the type of the result
    if (depth == 0 && text[i] == '(') return text.substr(begin, i - begin);
  }
  return text;
}

size_t shared_limit(const void* function, int device) {
  const auto it = shared_limits.find({function, device});
  return it == shared_limits.end() ? kShared - kSharedStatic : it->second;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t dynamic, cudaStream_t stream,
                   unsigned cluster = 1) {
  const Lock lock;
  Stream* const s = stream_of(stream);
  const int device = s->device;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024) {
    return fail(cudaErrorInvalidConfiguration);
  }
  if (cluster == 0 || cluster > 8 || grid.x % cluster) return fail(cudaErrorInvalidClusterSize);
  if (dynamic > shared_limit(function, device)) return fail(cudaErrorInvalidValue, "more shared memory than allowed");
  if (device != current_device) {
    return fail(cudaErrorInvalidResourceHandle, "stream of another device than the current one");
  }
  static auto& known = *new std::unordered_map<const void*, std::string>;
  std::string& name = known[function];
  if (name.empty()) name = short_name(names.at(function));
  if (name == "at::cuda::anonymous::spin_kernel") {
    s->asleep = true;
    return cudaSuccess;
  }
  const auto twin = twins.find(name);
  if (twin == twins.end()) return fail(cudaErrorNotSupported, "pretend CUDA has no twin of the kernel " + name);

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  const auto values = std::make_shared<std::vector<std::unique_ptr<void, Free>>>();
  for (size_t i = 0; i < twin->second.sizes.size(); ++i) {
    const size_t size = twin->second.sizes[i];
    values->emplace_back(std::aligned_alloc(64, (size + 63) / 64 * 64));
    std::memcpy(values->back().get(), arguments[i], size);
  }
  launches.push_back(
      {names.at(function), device, s == default_stream(device) ? nullptr : s, grid.x, block.x, cluster, dynamic});
  enqueue(s, device, [=, call = twin->second.call] {
    if (dynamic > shared_limit(function, device)) die("the limit of shared memory was lowered under a waiting kernel");
    std::vector<void*> pointers;
    for (const auto& value : *values) pointers.push_back(value.get());
    call(pointers.data(), &grid, &block, cluster, dynamic);
  });
  return cudaSuccess;
}

struct Configuration {
  dim3 grid, block;
  size_t dynamic;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

}  // namespace

// --- beside CUDA's own -----------------------------------------------------------------------------------------------

API void pretend_twin(const char* name, pretend_kernel twin, const size_t* sizes, size_t count) {
  const Lock lock;
  twins[short_name(name)] = {twin, {sizes, sizes + count}};
}
API size_t pretend_launches(pretend_launch* to, size_t capacity) {
  const Lock lock;
  const size_t count = std::min(launches.size(), capacity);
  std::copy_n(launches.begin(), count, to);
  launches.clear();
  return count;
}
API int pretend_run(void (*function)(void*), void* data, void* stream) {
  const Lock lock;
  enqueue(stream_of(stream), stream_of(stream)->device, [=] { function(data); });
  return cudaSuccess;
}
API int pretend_wait(void* stream) { return cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); }
API void pretend_open(int open) {
  const Lock lock;
  open_memory(open ? kEverybody : kNobody);
}

// --- kernels ---------------------------------------------------------------------------------------------------------

API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  const Lock lock;
  names[host] = name;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic, CUstream_st* stream) {
  configurations.push_back({grid, block, dynamic, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *dynamic = c.dynamic, *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t dynamic,
                                   cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, dynamic, stream);
}
API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t dynamic,
                                 cudaStream_t stream) {
  return launch(function, grid, block, arguments, dynamic, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c->attrs[i].val.clusterDim.x;
  }
  return launch(function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream, cluster);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->sharedSizeBytes = kSharedStatic;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const Lock lock;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value + kSharedStatic > kSharedOptIn) return fail(cudaErrorInvalidValue);
  shared_limits[{function, current_device}] = value;
  return cudaSuccess;
}

// --- errors ----------------------------------------------------------------------------------------------------------

API cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (!last_text.empty()) return last_text.c_str();
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "pretend CUDA error";
  }
}
API const char* cudaGetErrorName(cudaError_t) { return "cudaErrorPretend"; }

// --- devices ---------------------------------------------------------------------------------------------------------

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  *p = {};
  std::strcpy(p->name, "Pretend GPU");
  p->uuid.bytes[0] = p->pciBusID = 1 + device;
  p->totalGlobalMem = kMemory;
  p->sharedMemPerBlock = kShared;
  p->sharedMemPerBlockOptin = kSharedOptIn;
  p->sharedMemPerMultiprocessor = kSharedOptIn + 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->textureAlignment = 512;
  p->multiProcessorCount = kMultiprocessors;
  p->maxThreadsPerMultiProcessor = 2048;
  p->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrClusterLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedOptIn; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kShared; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
// None: a kernel that touches another device's memory is an error.
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  const Lock lock;
  if (const auto error = nothing_captured()) return error;
  drain_device(current_device);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock;
  *total = kMemory;
  *free = kMemory - used[current_device];
  return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// --- memory ----------------------------------------------------------------------------------------------------------

API cudaError_t cudaMalloc(void** p, size_t size) {
  const Lock lock;
  return allocate(p, size, current_device);
}
API cudaError_t cudaFree(void* p) {
  const Lock lock;
  if (const auto* block = find(p)) drain_device(block->second.device);
  return release(p);
}
API cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) {
  const Lock lock;
  return allocate(p, size, kHost);
}
API cudaError_t cudaFreeHost(void* p) {
  const Lock lock;
  for (int device = 0; device < kDevices; ++device) drain_device(device);
  return release(p);
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  const Lock lock;
  *attributes = {};
  attributes->device = -1;
  if (const auto* block = find(p)) {
    const bool host = block->second.device == kHost;
    attributes->type = host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->device = host ? current_device : block->second.device;
    attributes->devicePointer = const_cast<void*>(p);
    attributes->hostPointer = host ? const_cast<void*>(p) : nullptr;
  }
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const Lock lock;
  return copy(to, from, bytes, stream_of(stream));
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  const Lock lock;
  return copy(to, from, bytes, stream_of(stream));
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const Lock lock;
  if (const auto error = nothing_captured()) return error;
  copy(to, from, bytes, default_stream(current_device));
  drain(default_stream(current_device));
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock;
  enqueue(stream_of(stream), kEverybody, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

// --- streams and events ----------------------------------------------------------------------------------------------

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  const Lock lock;
  streams.push_back(new Stream{current_device, priority});
  *stream = reinterpret_cast<cudaStream_t>(streams.back());
  return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock;
  if (const auto error = not_captured(stream_of(stream))) return error;
  drain(stream_of(stream));
  return cudaSuccess;
}
// Asking makes a little progress, so that who asks again and again comes to an end.
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Lock lock;
  Stream* const s = stream_of(stream);
  if (const auto error = not_captured(s)) return error;
  if (s->done < s->enqueued) drain(s, s->done + 1);
  return s->done == s->enqueued ? cudaSuccess : fail(cudaErrorNotReady);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  const Lock lock;
  Stream* const s = stream_of(stream);
  const Event& event = *reinterpret_cast<Event*>(handle);
  if (event.capture) {
    if (s->capture && s->capture != event.capture) return fail(cudaErrorStreamCaptureMerge);
    s->capture = event.capture;
  } else if (s->capture && event.stream) {
    s->capture->valid = false;
    return fail(cudaErrorStreamCaptureIsolation);
  } else if (event.stream) {
    s->asleep |= event.stream->asleep && event.stream->done < event.count;
    push(s, {nullptr, event.stream, event.count});
  }
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  const Lock lock;
  Stream* const s = stream_of(stream);
  auto& event = *reinterpret_cast<Event*>(handle);
  event = {s, s->enqueued, s->capture, std::chrono::steady_clock::now()};
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const Lock lock;
  const auto& event = *reinterpret_cast<Event*>(handle);
  if (event.capture) return fail(cudaErrorCapturedEvent);
  if (event.stream && event.stream->done < event.count) drain(event.stream, event.stream->done + 1);
  return !event.stream || event.stream->done >= event.count ? cudaSuccess : fail(cudaErrorNotReady);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Lock lock;
  const auto& event = *reinterpret_cast<Event*>(handle);
  if (event.capture) return fail(cudaErrorCapturedEvent);
  if (event.stream) drain(event.stream, event.count);
  return cudaSuccess;
}
// Of the calls, as the pretend device takes no time of its own.
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  const auto between = reinterpret_cast<Event*>(end)->time - reinterpret_cast<Event*>(begin)->time;
  *ms = std::chrono::duration<float, std::milli>(between).count();
  return cudaSuccess;
}

// --- graphs ----------------------------------------------------------------------------------------------------------

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock;
  static unsigned long long id = 0;
  Stream* const s = stream_of(stream);
  if (s == default_stream(s->device)) return fail(cudaErrorStreamCaptureUnsupported);
  if (s->capture) return fail(cudaErrorIllegalState);
  s->capture = std::make_shared<Capture>(Capture{++id, new Graph, s});
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock;
  const auto capture = stream_of(stream)->capture;
  if (!capture || capture->origin != stream_of(stream)) return fail(cudaErrorStreamCaptureUnmatched);
  for (Stream* s : streams) {
    if (s->capture == capture) s->capture = nullptr;
  }
  *graph = capture->valid ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  return capture->valid ? cudaSuccess : fail(cudaErrorStreamCaptureInvalidated);
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock;
  const auto& capture = stream_of(stream)->capture;
  *status = !capture         ? cudaStreamCaptureStatusNone
            : capture->valid ? cudaStreamCaptureStatusActive
                             : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  const Lock lock;
  const auto& capture = stream_of(stream)->capture;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(now, *mode);
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t from, unsigned long long) {
  *graph = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(from)));
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  const Lock lock;
  Stream* const s = stream_of(stream);
  for (const auto& task : reinterpret_cast<Graph*>(graph)->tasks) push(s, {task});
  return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!nodes) *count = reinterpret_cast<Graph*>(graph)->tasks.size();
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  const Lock lock;
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
