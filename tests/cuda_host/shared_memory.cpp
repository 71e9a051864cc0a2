// Shared memory, byte by byte: who may touch what when, and the copies that land in it.

#include "resident.h"

namespace emulation {
namespace {

void check_ordered(const Access& earlier, const char* what, uint32_t address) {
    if (earlier.time > self->clock[earlier.thread]) {
        fail(std::string(what) + " shared address " + std::to_string(address) +
             " with no barrier since thread " + std::to_string(earlier.thread) + "'s access");
    }
}

// Checks and notes an access by this thread, or on its behalf. Atomic writes need no order among
// themselves.
void access_shared(uint32_t address, size_t bytes, bool write, bool atomic = false) {
    Block& block = *self->block;
    if (address + bytes > block.shared.size()) {
        fail("shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
             ", the block has " + std::to_string(block.shared.size()));
    }
    if (address % bytes != 0) {
        fail("shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
             " is not aligned");
    }
    const size_t warps = block.gatherings.size();
    const Access now{self->id, self->clock[self->id]};
    for (size_t i = address / 4; i < (address + bytes) / 4; i++) {
        Word& word = block.words[i];
        Access* read = &block.reads[i * warps];
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
    Block& block = *self->block;
    for (size_t i = copy.target / 4; i < (copy.target + copy.bytes) / 4; i++) {
        block.words[i].copy_under_way = false;
    }
    access_shared(copy.target, copy.bytes, true);
    std::memset(&block.shared[copy.target], 0, copy.bytes);
    std::memcpy(&block.shared[copy.target], copy.source, copy.source_bytes);
}

}  // namespace

void load_shared(uint32_t address, void* value, size_t bytes) {
    access_shared(address, bytes, false);
    std::memcpy(value, &self->block->shared[address], bytes);
}

void store_shared(uint32_t address, const void* value, size_t bytes) {
    access_shared(address, bytes, true);
    std::memcpy(&self->block->shared[address], value, bytes);
}

int atomic_add_shared(uint32_t address, int value) {
    preempt_sometimes();
    access_shared(address, sizeof(int), true, true);
    char* target = &self->block->shared[address];
    int before;
    std::memcpy(&before, target, sizeof(int));
    const int after = before + value;
    std::memcpy(target, &after, sizeof(int));
    return before;
}

void cp_async(uint32_t target, const void* source, size_t bytes, size_t source_bytes) {
    if (source_bytes > bytes) fail("cp.async of more bytes than its size");
    check_aligned(source, bytes);
    if (source_bytes > 0) access_global(source, source_bytes, GlobalAccess::kLoad);
    access_shared(target, bytes, true);
    Block& block = *self->block;
    std::memset(&block.shared[target], 0xff, bytes);
    for (size_t i = target / 4; i < (target + bytes) / 4; i++) block.words[i].copy_under_way = true;
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

}  // namespace emulation
