// Global memory: what a launch may touch, and who touched what in it.
//
// Blocks of a launch are ordered by nothing, so bytes that one of them writes are its own: another
// may neither write nor read them, but by atomics. Threads of one block are ordered by its barriers.

#include <array>
#include <unordered_map>

#include "resident.h"

namespace emulation {
namespace {

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

struct Who {
    uint32_t block = 0, thread = 0, time = 0;  // time 0: nobody
};

// Two bytes, which no access is smaller than: the last write and the last read in this launch.
struct Cell {
    Who write, read;
    bool atomic = false;  // the last write was
    bool read_only = false;  // a read went through the read-only path
    bool read_by_many = false;  // by more than one block
};

constexpr uintptr_t kCellBytes = 2;
constexpr uintptr_t kPageBytes = 1024;
using Page = std::array<Cell, kPageBytes / kCellBytes>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = 0;
Page* last_page = nullptr;

// Null where nothing was noted and nothing is to be.
Page* page_of(uintptr_t address, bool to_note) {
    const uintptr_t number = address / kPageBytes;
    if (number == last_number && (last_page != nullptr || !to_note)) return last_page;
    last_number = number;
    const auto at = pages.find(number);
    if (at != pages.end()) return last_page = at->second.get();
    if (!to_note) return last_page = nullptr;
    return last_page = (pages[number] = std::make_unique<Page>()).get();
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

bool is_ordered(const Who& earlier) {
    if (earlier.time == 0) return true;
    return earlier.block == self->block->index && earlier.time <= self->clock[earlier.thread];
}

std::string name(const Who& who) {
    return "block " + std::to_string(who.block) + ", thread " + std::to_string(who.thread);
}

void check_and_note(Cell& cell, GlobalAccess access) {
    const Who now{self->block->index, self->id, self->clock[self->id]};
    if (access == GlobalAccess::kReadOnlyLoad) {
        if (cell.write.time != 0) {
            fail("load through the read-only path of what " + name(cell.write) +
                 " has written in this launch");
        }
        cell.read_only = true;
    }
    if (access == GlobalAccess::kLoad || access == GlobalAccess::kReadOnlyLoad) {
        if (!cell.atomic && !is_ordered(cell.write)) {
            fail("load of what " + name(cell.write) + " has written, and no barrier orders them");
        }
        cell.read_by_many = cell.read_by_many || (cell.read.time != 0 && cell.read.block != now.block);
        cell.read = now;
        return;
    }
    const bool atomic = access == GlobalAccess::kAtomic;
    if (cell.read_only) {
        fail("store to what " + name(cell.read) + " has loaded through the read-only path");
    }
    if (!(atomic && cell.atomic) && !is_ordered(cell.write)) {
        fail("store to what " + name(cell.write) + " has written, and no barrier orders them");
    }
    if (!atomic && (cell.read_by_many || !is_ordered(cell.read))) {
        fail("store to what " + name(cell.read) + " has read, and no barrier orders them");
    }
    cell.write = now;
    cell.atomic = atomic;
}

}  // namespace

void allow(uintptr_t pointer, size_t rows, size_t row_bytes, ptrdiff_t stride, bool writable) {
    views.push_back({pointer, rows, row_bytes, stride, writable});
}

void forbid_all() { views.clear(); }

void forget_global_accesses() {
    pages.clear();
    last_page = nullptr;
    last_number = 0;
}

void check_aligned(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
    fail("global access of " + std::to_string(bytes) + " bytes is not aligned");
}

void access_global(const void* pointer, size_t bytes, GlobalAccess access) {
    const bool write = access == GlobalAccess::kStore || access == GlobalAccess::kAtomic;
    check_allowed(pointer, bytes, write);
    preempt_sometimes();
    // Reads cost time to note. In order they are only held against the writes before them.
    const bool to_note = write || is_interleaved();
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (address % kCellBytes != 0 || bytes % kCellBytes != 0) fail("access of less than two bytes");
    // No access crosses a page: it is aligned to its size.
    Page* page = page_of(address, to_note);
    if (page == nullptr) return;
    for (size_t i = 0; i < bytes; i += kCellBytes) {
        check_and_note((*page)[(address + i) % kPageBytes / kCellBytes], access);
    }
}

}  // namespace emulation
