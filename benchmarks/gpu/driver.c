/* In the place of libcuda.so.1: what Triton's launcher asks of a driver, for a GPU that does nothing.

   `launched` has the names of the kernels that were launched, in order. */
#include <stddef.h>
#include <string.h>

enum { MOST = 1 << 20 };
static const char* names[MOST];
static size_t number;
static int context;

size_t launched(const char*** first) {
    *first = names;
    return number;
}
void forget(void) { number = 0; }

typedef struct {
    unsigned grid[3], block[3];
} Config;

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** more) {
    if (number < MOST) names[number++] = function;
    return 0;
}
int cuModuleLoadData(void** module, const void* image) {
    *module = &context;
    return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = strdup(name);
    return 0;
}
int cuModuleUnload(void* module) { return 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) {
    *value = attribute == 0 ? 1024 : 0; /* threads a block */
    return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
    *(unsigned long long*)value = pointer;
    return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) {
    *version = 13000;
    return 0;
}
int cuGetErrorString(int code, const char** text) {
    *text = "an error of the stand-in";
    return 0;
}
int cuCtxGetCurrent(void** current) {
    *current = &context;
    return 0;
}
int cuCtxSetCurrent(void* current) { return 0; }
int cuCtxGetDevice(int* device) {
    *device = 0;
    return 0;
}
int cuCtxGetLimit(size_t* value, int limit) {
    *value = 0;
    return 0;
}
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDeviceGetCount(int* count) {
    *count = 1;
    return 0;
}
int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return 0;
}
int cuDevicePrimaryCtxRetain(void** current, int device) {
    *current = &context;
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) { /* an H100's */
        case 8: *value = 48 << 10; break;   /* shared memory a block */
        case 10: *value = 32; break;        /* threads a warp */
        case 12: *value = 65536; break;     /* registers a block */
        case 16: *value = 132; break;       /* multiprocessors */
        case 75: *value = 9; break;         /* compute capability */
        case 76: *value = 0; break;
        case 81: *value = 228 << 10; break; /* shared memory a multiprocessor */
        case 97: *value = 227 << 10; break; /* shared memory a block, if it asks */
        default: *value = 1;
    }
    return 0;
}
int cuStreamIsCapturing(void* stream, int* status) {
    *status = 0;
    return 0;
}
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) {
    *clusters = 1;
    return 0;
}
int cuTensorMapEncodeTiled(void* map) { return 0; }
int cuTensorMapEncodeIm2col(void* map) { return 0; }
