#include "emulation.h"

#include <algorithm>
#include <csetjmp>
#include <deque>
#include <map>
#include <memory>
#include <ucontext.h>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kBarriers = 16;

// Lamport's vector clocks, a component for each thread. A thread's own component numbers the spans
// between its synchronisations; what it knows of another's says up to where that one is ordered
// before it.
using Clock = std::vector<uint32_t>;

struct Copy {
    uint32_t target;
    const void* source;
    size_t bytes, source_bytes;
};

struct Thread {
    jmp_buf context;
    ucontext_t start;
    std::unique_ptr<char[]> stack;
    unsigned id = 0;
    bool finished = false;
    std::string waits_for;
    Clock clock;
    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> groups;
};

struct Barrier {
    int expected = 0;
    std::vector<unsigned> arrived, waiting;
};

// Lanes that have come to an operation, waiting for the others that it names.
struct Gathering {
    const char* name;
    uint32_t lanes, arrived;
    WarpOperation run;
    void* operands[32];
};

// Who last wrote four bytes of shared memory, and who of each warp last read them.
struct Access {
    uint32_t thread = 0, time = 0;  // time 0: nobody
};

struct Word {
    Access write;
    bool atomic = false;  // the last write was
    bool copy_under_way = false;
};

struct View {
    uintptr_t begin;
    size_t rows, row_bytes;
    ptrdiff_t stride;
    bool writable;

    bool holds(uintptr_t pointer, size_t bytes) const {
        const size_t extent = (rows - 1) * stride + row_bytes;
        if (rows == 0 || pointer < begin || pointer + bytes > begin + extent) return false;
        if (stride < static_cast<ptrdiff_t>(row_bytes)) return true;  // rows overlap
        return (pointer - begin) % stride + bytes <= row_bytes;
    }
};

std::vector<View> views;

// The block that runs. Fibers outlive it: they are reused by the next.
std::vector<std::unique_ptr<Thread>> fibers;
std::vector<Thread*> threads;
std::deque<unsigned> ready;
std::string kernel_name;
const std::function<void()>* thread_body;
std::exception_ptr failure;
jmp_buf scheduler;
Thread* self;
Barrier barriers[kBarriers];
std::vector<std::vector<Gathering>> gatherings;
std::vector<char> shared;
std::vector<Word> words;
std::vector<Access> reads;

std::string where(const Thread& thread) {
    return kernel_name + ", block " + std::to_string(blockIdx.x) + ", thread " +
           std::to_string(thread.id);
}

[[noreturn]] void fail(const std::string& what) { throw Error(where(*self) + ": " + what); }

void leave() {
    if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
}

void wait_for(std::string what) {
    self->waits_for = std::move(what);
    leave();
}

void wake(unsigned id) {
    threads[id]->waits_for.clear();
    ready.push_back(id);
}

[[noreturn]] void fiber_main() {
    for (;;) {
        try {
            (*thread_body)();
        } catch (...) {
            failure = std::current_exception();
        }
        self->finished = true;
        leave();
    }
}

void resume(Thread& thread) {
    self = &thread;
    threadIdx = {thread.id, 0, 0};
    if (_setjmp(scheduler) != 0) return;
    if (thread.stack != nullptr) _longjmp(thread.context, 1);
    thread.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, reinterpret_cast<void (*)()>(&fiber_main), 0);
    setcontext(&thread.start);
}

void start_block(unsigned block, unsigned n_threads, size_t shared_bytes) {
    blockIdx = {block, 0, 0};
    threads.clear();
    ready.clear();
    failure = nullptr;
    for (Barrier& b : barriers) b = Barrier{};
    const unsigned warps = (n_threads + 31) / 32;
    gatherings.assign(warps, {});
    shared.assign(shared_bytes, static_cast<char>(0xff));
    words.assign((shared_bytes + 3) / 4, Word{});
    reads.assign(words.size() * warps, Access{});
    for (unsigned id = 0; id < n_threads; id++) {
        if (id == fibers.size()) fibers.push_back(std::make_unique<Thread>());
        Thread& thread = *fibers[id];
        thread.id = id;
        thread.finished = false;
        thread.waits_for.clear();
        thread.clock.assign(n_threads, 0);
        thread.clock[id] = 1;
        thread.uncommitted.clear();
        thread.groups.clear();
        threads.push_back(&thread);
        ready.push_back(id);
    }
}

// Each of `ids` comes to know all that any of them knew.
void order(const std::vector<unsigned>& arrived, const std::vector<unsigned>& waiting) {
    Clock all(threads.size(), 0);
    for (unsigned id : arrived) {
        for (size_t i = 0; i < all.size(); i++) all[i] = std::max(all[i], threads[id]->clock[i]);
    }
    for (unsigned id : waiting) {
        const uint32_t own = threads[id]->clock[id];
        threads[id]->clock = all;
        threads[id]->clock[id] = own;
    }
    for (unsigned id : arrived) threads[id]->clock[id]++;
}

void check_ordered(const Access& earlier, const char* what, uint32_t address) {
    if (earlier.time > self->clock[earlier.thread]) {
        fail(std::string(what) + " shared address " + std::to_string(address) +
             " with no barrier since thread " + std::to_string(earlier.thread) + "'s access");
    }
}

// Checks and notes an access to shared memory by this thread, or on its behalf. Atomic writes need
// no order among themselves.
void access_shared(uint32_t address, size_t bytes, bool write, bool atomic = false) {
    if (address + bytes > shared.size()) {
        fail("shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
             ", the block has " + std::to_string(shared.size()));
    }
    if (address % bytes != 0) {
        fail("shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
             " is not aligned");
    }
    const size_t warps = gatherings.size();
    const Access now{self->id, self->clock[self->id]};
    for (size_t i = address / 4; i < (address + bytes) / 4; i++) {
        Word& word = words[i];
        Access* read = &reads[i * warps];
        if (word.copy_under_way) {
            fail("access to shared address " + std::to_string(4 * i) +
                 ", where a cp.async has not been waited for");
        }
        if (!atomic || !word.atomic) check_ordered(word.write, write ? "writes" : "reads", 4 * i);
        if (write) {
            for (size_t w = 0; w < warps; w++) {
                check_ordered(read[w], "writes", 4 * i);
                read[w] = Access{};
            }
            word.write = now;
            word.atomic = atomic;
        } else {
            read[self->id / 32] = now;
        }
    }
}

void land(const Copy& copy) {
    for (size_t i = copy.target / 4; i < (copy.target + copy.bytes) / 4; i++) {
        words[i].copy_under_way = false;
    }
    access_shared(copy.target, copy.bytes, true);
    std::memset(&shared[copy.target], 0, copy.bytes);
    std::memcpy(&shared[copy.target], copy.source, copy.source_bytes);
}

void check_aligned(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
    fail("global access of " + std::to_string(bytes) + " bytes is not aligned");
}

void check_allowed(const void* pointer, size_t bytes, bool write) {
    bool readable = false;
    for (const View& view : views) {
        if (!view.holds(reinterpret_cast<uintptr_t>(pointer), bytes)) continue;
        readable = true;
        if (!write || view.writable) return;
    }
    if (readable) fail("store to an operand that is only read");
    fail((write ? "store of " : "load of ") + std::to_string(bytes) +
         " bytes outside every operand");
}

// Such as "0-31" or "3 8-15".
std::string ranges(const std::vector<unsigned>& ids) {
    std::string text;
    for (size_t i = 0; i < ids.size();) {
        size_t last = i;
        while (last + 1 < ids.size() && ids[last + 1] == ids[last] + 1) last++;
        text += (text.empty() ? "" : " ") + std::to_string(ids[i]);
        if (last > i) text += "-" + std::to_string(ids[last]);
        i = last + 1;
    }
    return text;
}

std::string of_lanes(const char* name, uint32_t lanes) {
    std::vector<unsigned> ids;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (lanes >> lane & 1) ids.push_back(lane);
    }
    return std::string(name) + " of lanes " + ranges(ids);
}

// What keeps the threads that did not finish.
std::string deadlock() {
    std::map<std::string, std::vector<unsigned>> states;
    for (const Thread* thread : threads) {
        states[thread->finished ? "have ended" : "wait for " + thread->waits_for].push_back(
            thread->id);
    }
    std::string text = kernel_name + ", block " + std::to_string(blockIdx.x) +
                       ": not all threads come to a barrier or warp operation";
    for (const auto& [state, ids] : states) text += "\n  threads " + ranges(ids) + " " + state;
    return text;
}

}  // namespace

void run_grid(const std::string& kernel, unsigned blocks, unsigned n_threads, size_t shared_bytes,
              const std::function<void()>& thread) {
    kernel_name = kernel;
    thread_body = &thread;
    gridDim = {blocks, 1, 1};
    blockDim = {n_threads, 1, 1};
    for (unsigned block = 0; block < blocks; block++) {
        start_block(block, n_threads, shared_bytes);
        while (!ready.empty() && !failure) {
            Thread& next = *threads[ready.front()];
            ready.pop_front();
            resume(next);
        }
        bool finished = true;
        for (const Thread* t : threads) finished = finished && t->finished;
        if (finished && !failure) continue;
        const std::string stuck = failure ? "" : deadlock();
        // The fibers that did not finish hold frames of this launch: they are not used again.
        fibers.clear();
        if (failure) std::rethrow_exception(failure);
        throw Error(stuck);
    }
}

void allow(uintptr_t pointer, size_t rows, size_t row_bytes, ptrdiff_t stride, bool writable) {
    views.push_back({pointer, rows, row_bytes, stride, writable});
}

void forbid_all() { views.clear(); }

void check_global(const void* pointer, size_t bytes, bool write) {
    check_aligned(pointer, bytes);
    check_allowed(pointer, bytes, write);
}

void load_shared(uint32_t address, void* value, size_t bytes) {
    access_shared(address, bytes, false);
    std::memcpy(value, &shared[address], bytes);
}

void store_shared(uint32_t address, const void* value, size_t bytes) {
    access_shared(address, bytes, true);
    std::memcpy(&shared[address], value, bytes);
}

int atomic_add_shared(uint32_t address, int value) {
    access_shared(address, sizeof(int), true, true);
    int before;
    std::memcpy(&before, &shared[address], sizeof(int));
    const int after = before + value;
    std::memcpy(&shared[address], &after, sizeof(int));
    return before;
}

void cp_async(uint32_t target, const void* source, size_t bytes, size_t source_bytes) {
    if (source_bytes > bytes) fail("cp.async of more bytes than its size");
    check_aligned(source, bytes);
    if (source_bytes > 0) check_allowed(source, source_bytes, false);
    access_shared(target, bytes, true);
    std::memset(&shared[target], 0xff, bytes);
    for (size_t i = target / 4; i < (target + bytes) / 4; i++) words[i].copy_under_way = true;
    self->uncommitted.push_back({target, source, bytes, source_bytes});
}

void cp_async_commit() {
    self->groups.push_back(std::move(self->uncommitted));
    self->uncommitted.clear();
}

void cp_async_wait(size_t groups) {
    while (self->groups.size() > groups) {
        for (const Copy& copy : self->groups.front()) land(copy);
        self->groups.pop_front();
    }
}

int threads_of_block() { return static_cast<int>(blockDim.x); }

void barrier(int number, int n_threads, bool wait) {
    if (number < 0 || number >= kBarriers) fail("there is no barrier " + std::to_string(number));
    if (n_threads % 32 != 0 && number != 0) fail("a named barrier counts whole warps");
    Barrier& b = barriers[number];
    const std::string name = "barrier " + std::to_string(number);
    if (b.arrived.empty()) b.expected = n_threads;
    if (b.expected != n_threads) {
        fail(name + " for " + std::to_string(n_threads) + " threads, others said " +
             std::to_string(b.expected));
    }
    b.arrived.push_back(self->id);
    if (wait) b.waiting.push_back(self->id);
    if (static_cast<int>(b.arrived.size()) < n_threads) {
        if (wait) wait_for(name);
        return;
    }
    const Barrier full = std::move(b);
    b = Barrier{};
    order(full.arrived, full.waiting);
    for (unsigned id : full.waiting) {
        if (id != self->id) wake(id);
    }
}

void warp_operation(const char* name, uint32_t lanes, void* operand, WarpOperation run) {
    const unsigned warp = self->id / 32, lane = self->id % 32;
    if (!(lanes >> lane & 1)) {
        fail(of_lanes(name, lanes) + " by lane " + std::to_string(lane));
    }
    std::vector<Gathering>& open = gatherings[warp];
    auto at = open.begin();
    while (at != open.end() && !(at->lanes & lanes)) ++at;
    if (at == open.end()) {
        open.push_back(Gathering{name, lanes, 0, run, {}});
        at = open.end() - 1;
    }
    if (at->lanes != lanes || at->run != run) {
        fail(of_lanes(name, lanes) + " while others are at " + of_lanes(at->name, at->lanes));
    }
    at->arrived |= 1u << lane;
    at->operands[lane] = operand;
    if (at->arrived != lanes) {
        wait_for(of_lanes(name, lanes));
        return;
    }
    Gathering full = *at;
    open.erase(at);
    try {
        full.run(full.operands);
    } catch (const Error& error) {
        fail(error.what());
    }
    for (unsigned other = 0; other < 32; other++) {
        if (other != lane && (lanes >> other & 1)) wake(warp * 32 + other);
    }
}

void sync_warp(uint32_t lanes) {
    warp_operation("sync_warp", lanes, self, [](void* (&operands)[32]) {
        std::vector<unsigned> ids;
        for (void* operand : operands) {
            if (operand != nullptr) ids.push_back(static_cast<Thread*>(operand)->id);
        }
        order(ids, ids);
    });
}

uint32_t vote(bool predicate, uint32_t lanes) {
    uint32_t bits = predicate;
    warp_operation("vote", lanes, &bits, [](void* (&operands)[32]) {
        uint32_t all = 0;
        for (int lane = 0; lane < 32; lane++) {
            if (operands[lane] == nullptr) continue;
            all |= *static_cast<uint32_t*>(operands[lane]) << lane;
        }
        for (void* operand : operands) {
            if (operand != nullptr) *static_cast<uint32_t*>(operand) = all;
        }
    });
    return bits;
}

}  // namespace emulation
