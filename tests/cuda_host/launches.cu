// The half of csrc/launch.cuh that the emulation has another body for, for tests/test_cuda_launch.py:
// compiled by nvcc and linked with the CUDA runtime below, which notes what it is asked and launches
// nothing.

#include <map>
#include <string>

#include "launch.cuh"

namespace {

struct Numbers {
    int first;
    double second;
};

std::string calls;
// What a function of the runtime returns the next time.
std::map<std::string, cudaError_t> refusals;
cudaError_t last_error = cudaSuccess;
int current_device = 0;

cudaError_t answer(const std::string& function, const std::string& arguments) {
    calls += function + "(" + arguments + ")\n";
    const auto at = refusals.find(function);
    if (at == refusals.end()) return cudaSuccess;
    last_error = at->second;
    refusals.erase(at);
    return last_error;
}

std::string text(long long number) { return std::to_string(number); }

__global__ void kernel_of_numbers(Numbers) {}

}  // namespace

// Where nvcc compiles for the device, some of these are there already.
#ifndef __CUDA_ARCH__

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return answer("cudaGetDevice", "");
}

cudaError_t cudaSetDevice(int device) {
    const cudaError_t error = answer("cudaSetDevice", text(device));
    if (error == cudaSuccess) current_device = device;
    return error;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 227 * 1024;
    return answer("cudaDeviceGetAttribute", text(attribute) + ", " + text(device));
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
    return answer("cudaFuncSetAttribute", text(attribute) + ", " + text(value));
}

cudaError_t cudaLaunchKernel(const void*, dim3 blocks, dim3 threads, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
    const Numbers& numbers = *static_cast<const Numbers*>(arguments[0]);
    return answer("cudaLaunchKernel",
                  text(blocks.x) + "x" + text(blocks.y * blocks.z) + ", " + text(threads.x) + "x" +
                      text(threads.y * threads.z) + ", " + text(shared_bytes) + ", " +
                      text(reinterpret_cast<intptr_t>(stream)) + ", " + text(numbers.first) + ", " +
                      std::to_string(numbers.second) + ", device " + text(current_device));
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfATest"; }
const char* cudaGetErrorString(cudaError_t) { return "as the test has it"; }

// What nvcc calls to make kernels known.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
char __cudaInitModule(void**) { return 0; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaErrorNotSupported;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }

// What the runtime was asked since the last time.
const char* asked() {
    static std::string since;
    since.swap(calls);
    calls.clear();
    return since.c_str();
}

void refuse(const char* function) { refusals[function] = cudaErrorInvalidValue; }

int multiprocessors() { return encoder_fast::multiprocessors(); }

// As the launchers do it. Returns the error, if there is one.
const char* start(int64_t blocks, int threads, size_t shared_bytes, int device, intptr_t stream) {
    static std::string error;
    error.clear();
    try {
        const encoder_fast::DeviceScope scope(device);
        encoder_fast::launch(kernel_of_numbers, {blocks, threads, shared_bytes}, Numbers{7, 2.5},
                             reinterpret_cast<cudaStream_t>(stream), "an op of (7, 2)");
    } catch (const encoder_fast::LaunchError& raised) {
        error = raised.what();
    }
    return error.c_str();
}

}  // extern "C"

#endif
