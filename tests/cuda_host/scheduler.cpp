// Who runs when: fibers for threads, blocks one after another or side by side, barriers, and the
// operations of a warp.

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <random>

#include "resident.h"

namespace emulation {

Thread* self;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
// Side by side: what two multiprocessors hold of kernels that keep four blocks on each.
constexpr unsigned kMostResident = 8;
constexpr unsigned kPreemptOneIn = 4;

std::string kernel_name;
const std::function<void()>* thread_body;
std::exception_ptr failure;
jmp_buf scheduler;
std::function<void(const std::string&)> launch_observer;

std::optional<uint64_t> seed;
std::mt19937_64 numbers;

// Fibers outlive their block: they are reused by the next.
std::vector<std::unique_ptr<Thread>> fibers;
std::vector<Thread*> free_fibers;
std::vector<std::unique_ptr<Block>> resident;

unsigned random_below(unsigned n) { return static_cast<unsigned>(numbers() % n); }

std::string where(const Block& block) {
    std::string text = kernel_name;
    if (seed) text += " (blocks interleaved by seed " + std::to_string(*seed) + ")";
    return text + ", block " + std::to_string(block.index);
}

void leave() {
    if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
}

void wait_for(std::string what) {
    self->waits_for = std::move(what);
    leave();
}

void wake(unsigned id) {
    Thread* thread = self->block->threads[id];
    thread->waits_for.clear();
    self->block->ready.push_back(thread);
}

[[noreturn]] void fiber_main() {
    for (;;) {
        try {
            (*thread_body)();
        } catch (...) {
            failure = std::current_exception();
        }
        self->finished = true;
        self->block->unfinished--;
        leave();
    }
}

void resume(Thread& thread) {
    self = &thread;
    threadIdx = {thread.id, 0, 0};
    blockIdx = {thread.block->index, 0, 0};
    if (_setjmp(scheduler) != 0) return;
    if (thread.stack != nullptr) _longjmp(thread.context, 1);
    thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, reinterpret_cast<void (*)()>(&fiber_main), 0);
    setcontext(&thread.start);
}

Thread* take_fiber() {
    if (free_fibers.empty()) {
        fibers.push_back(std::make_unique<Thread>());
        return fibers.back().get();
    }
    Thread* fiber = free_fibers.back();
    free_fibers.pop_back();
    return fiber;
}

void start_block(unsigned index, unsigned n_threads, size_t shared_bytes) {
    auto block = std::make_unique<Block>();
    const unsigned warps = (n_threads + 31) / 32;
    block->index = index;
    block->unfinished = n_threads;
    if (seed) block->speed = 1u << random_below(4);
    block->gatherings.assign(warps, {});
    block->shared.assign(shared_bytes, static_cast<char>(0xff));
    block->words.assign((shared_bytes + 3) / 4, Word{});
    block->reads.assign(block->words.size() * warps, Access{});
    for (unsigned id = 0; id < n_threads; id++) {
        Thread& thread = *take_fiber();
        thread.block = block.get();
        thread.id = id;
        thread.finished = false;
        thread.waits_for.clear();
        thread.clock.assign(n_threads, 0);
        thread.clock[id] = 1;
        thread.uncommitted.clear();
        thread.groups.clear();
        block->threads.push_back(&thread);
        block->ready.push_back(&thread);
    }
    resident.push_back(std::move(block));
}

void retire_finished_blocks() {
    const auto last = std::stable_partition(resident.begin(), resident.end(),
                                            [](const auto& b) { return b->unfinished > 0; });
    for (auto block = last; block != resident.end(); ++block) {
        const std::vector<Thread*>& threads = (*block)->threads;
        free_fibers.insert(free_fibers.end(), threads.begin(), threads.end());
    }
    resident.erase(last, resident.end());
}

// The thread to run next; null where all wait. In order it is the one that has been ready longest.
// Otherwise any, but threads of fast blocks more often, so that blocks come to lie far apart.
Thread* pick() {
    unsigned all = 0;
    for (const auto& block : resident) all += block->ready.empty() ? 0 : block->speed;
    if (all == 0) return nullptr;
    unsigned chosen = seed ? random_below(all) : 0;
    for (const auto& block : resident) {
        if (block->ready.empty()) continue;
        if (chosen >= block->speed) {
            chosen -= block->speed;
            continue;
        }
        std::deque<Thread*>& ready = block->ready;
        if (seed) std::swap(ready.front(), ready[random_below(ready.size())]);
        Thread* thread = ready.front();
        ready.pop_front();
        return thread;
    }
    return nullptr;
}

// Each of `ids` comes to know all that any of them knew.
void order(const std::vector<unsigned>& arrived, const std::vector<unsigned>& waiting) {
    const std::vector<Thread*>& threads = self->block->threads;
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

// What keeps the threads of a block that did not finish.
std::string deadlock(const Block& block) {
    std::map<std::string, std::vector<unsigned>> states;
    for (const Thread* thread : block.threads) {
        states[thread->finished ? "have ended" : "wait for " + thread->waits_for].push_back(
            thread->id);
    }
    std::string text = where(block) + ": not all threads come to a barrier or warp operation";
    for (const auto& [state, ids] : states) text += "\n  threads " + ranges(ids) + " " + state;
    return text;
}

// The fibers that did not finish hold frames of a launch that failed: they are not used again.
void drop_all() {
    resident.clear();
    free_fibers.clear();
    fibers.clear();
}

}  // namespace

void fail(const std::string& what) {
    throw Error(where(*self->block) + ", thread " + std::to_string(self->id) + ": " + what);
}

bool is_interleaved() { return seed.has_value(); }

void preempt_sometimes() {
    if (!seed || random_below(kPreemptOneIn) != 0) return;
    self->block->ready.push_back(self);
    leave();
}

void interleave(uint64_t by_seed) { seed = by_seed; }
void run_in_order() { seed.reset(); }

void observe_launches(std::function<void(const std::string&)> observer) {
    launch_observer = std::move(observer);
}

void run_grid(const std::string& kernel, unsigned blocks, unsigned n_threads, size_t shared_bytes,
              const std::function<void()>& thread) {
    kernel_name = kernel;
    thread_body = &thread;
    gridDim = {blocks, 1, 1};
    blockDim = {n_threads, 1, 1};
    failure = nullptr;
    forget_global_accesses();
    std::vector<unsigned> to_come(blocks);
    std::iota(to_come.rbegin(), to_come.rend(), 0);
    unsigned most_resident = 1;
    if (seed) {
        numbers.seed(*seed);
        std::shuffle(to_come.begin(), to_come.end(), numbers);
        most_resident = 2 + random_below(kMostResident - 1);
    }
    for (;;) {
        while (!to_come.empty() && resident.size() < most_resident) {
            start_block(to_come.back(), n_threads, shared_bytes);
            to_come.pop_back();
        }
        Thread* next = pick();
        if (next == nullptr) break;
        resume(*next);
        if (failure) {
            drop_all();
            std::rethrow_exception(failure);
        }
        if (next->finished && next->block->unfinished == 0) retire_finished_blocks();
    }
    if (!resident.empty()) {
        const std::string stuck = deadlock(*resident.front());
        drop_all();
        throw Error(stuck);
    }
    if (launch_observer) launch_observer(kernel);
}

int threads_of_block() { return static_cast<int>(blockDim.x); }

void barrier(int number, int n_threads, bool wait) {
    if (number < 0 || number >= kBarriers) fail("there is no barrier " + std::to_string(number));
    if (n_threads % 32 != 0 && number != 0) fail("a named barrier counts whole warps");
    Barrier& b = self->block->barriers[number];
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
    std::vector<Gathering>& open = self->block->gatherings[warp];
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
