// What the parts of the emulation share: the blocks that run, their threads, and who they are.

#pragma once

#include <csetjmp>
#include <deque>
#include <memory>
#include <ucontext.h>
#include <vector>

#include "emulation.h"

namespace emulation {

constexpr int kBarriers = 16;

// Lamport's vector clocks, a component for each thread of a block. A thread's own component numbers
// the spans between its synchronisations; what it knows of another's says up to where that one is
// ordered before it.
using Clock = std::vector<uint32_t>;

struct Block;

struct Copy {
    uint32_t target;
    const void* source;
    size_t bytes, source_bytes;
};

struct Thread {
    jmp_buf context;
    ucontext_t start;
    std::unique_ptr<char[]> stack;
    Block* block = nullptr;
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

struct Block {
    unsigned index = 0;
    // How often its threads are picked, beside those of other blocks.
    unsigned speed = 1;
    unsigned unfinished = 0;
    std::vector<Thread*> threads;
    std::deque<Thread*> ready;
    Barrier barriers[kBarriers];
    std::vector<std::vector<Gathering>> gatherings;  // of each warp
    std::vector<char> shared;
    std::vector<Word> words;
    std::vector<Access> reads;  // of each word, by each warp
};

// The thread that runs.
extern Thread* self;

[[noreturn]] void fail(const std::string& what);

// Whether the blocks of this launch run side by side, in random order.
bool is_interleaved();

// Lets other threads run first, now and then, where blocks run side by side.
void preempt_sometimes();

// What is known of accesses to global memory ends with a launch.
void forget_global_accesses();

}  // namespace emulation
