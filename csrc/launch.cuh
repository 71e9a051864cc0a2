// Starting a kernel, and what a launcher asks the device.
//
// `launch(kernel, {...}, params, stream, what)` starts `kernel(params)` and throws LaunchError with
// `what` (the operation and its shape) and CUDA's message if that fails. Under ENCODER_FAST_HOST it
// runs the kernel in the emulation, to its end.

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "ptx.cuh"

namespace encoder_fast {

struct LaunchError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct LaunchShape {
    int64_t blocks;
    int threads;
    size_t shared_bytes = 0;
};

#ifdef ENCODER_FAST_HOST

using Stream = const void*;

inline int multiprocessors() { return 2; }

// The largest dynamic shared memory of a block, as on sm_80.
inline size_t shared_memory_limit() { return 163 * 1024; }

template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params, Stream,
            const std::string& what) {
    emulation::run_grid(what, static_cast<unsigned>(shape.blocks),
                        static_cast<unsigned>(shape.threads), shape.shared_bytes,
                        [&] { kernel(params); });
}

// Makes a device current for the launches in this scope; -1 leaves it as it is.
struct DeviceScope {
    explicit DeviceScope(int) {}
};

#else

using Stream = cudaStream_t;

inline void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    throw LaunchError(what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// The largest dynamic shared memory of a block.
inline size_t shared_memory_limit() {
    return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params, Stream stream,
            const std::string& what) {
    constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
    constexpr size_t kSharedWithoutAsking = 48 * 1024;
    if (shape.blocks > kMostBlocks) throw LaunchError(what + ": more blocks than a grid may have");
    const void* entry = reinterpret_cast<const void*>(kernel);
    if (shape.shared_bytes > kSharedWithoutAsking) {
        check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shape.shared_bytes)),
              what);
    }
    Params copy = params;
    void* arguments[] = {&copy};
    // Not cudaGetLastError behind it: that would tell of calls that have raised already.
    check(cudaLaunchKernel(entry, dim3(static_cast<unsigned>(shape.blocks)), dim3(shape.threads),
                           arguments, shape.shared_bytes, stream),
          what);
}

class DeviceScope {
  public:
    explicit DeviceScope(int device) : device_(device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (changes()) check(cudaSetDevice(device), "cudaSetDevice");
    }
    DeviceScope(const DeviceScope&) = delete;
    ~DeviceScope() {
        if (changes()) cudaSetDevice(before_);
    }

  private:
    bool changes() const { return device_ >= 0 && device_ != before_; }

    int device_;
    int before_ = 0;
};

#endif

}  // namespace encoder_fast
