// What a tar shard holds and where. The twin in Python, vlpfast/data/_tar.py, gives the same tables and messages.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "file.h"

namespace vlpfast::host {

// The members of an archive that belong to samples, in its order.
struct Members {
    std::vector<std::string> names;
    std::vector<int64_t> offsets; // bytes, of the data
    std::vector<int64_t> sizes;
};

struct Shard {
    std::vector<int64_t> offsets;        // [M]
    std::vector<int64_t> sizes;          // [M]
    std::vector<int32_t> extension_ids;  // [M] position in `extensions`
    std::vector<std::string> extensions; // lower case
    std::vector<int64_t> sample_ends;    // [S] members up to and with each sample
    std::string keys;                    // all keys, one after the other
    std::vector<int64_t> key_ends;       // [S]
    int64_t file_size = 0;
    std::string problem;              // empty: the archive is sound
    bool complete = false;            // ends with the two zero blocks that close an archive
    std::optional<std::string> index; // what its index file should hold, if that must be written and can be
};

struct Damage {
    std::string text;
};

// Key and extension of a member; nothing for one that belongs to no sample: a hidden file, or a name without an
// extension.
std::optional<std::pair<std::string_view, std::string_view>> split_name(std::string_view name);

// A number of at most 18 decimal digits.
std::optional<int64_t> decimal(std::string_view text);

constexpr int64_t block_size = 512;

struct Header {
    std::string name;
    char kind;
    int64_t size;
};

// A header block; nothing if its checksum or its size is wrong.
std::optional<Header> parse_header(const char* block);

// Appends the members of samples from byte `at` on; whether the archive ends with its two zero blocks. Throws Damage.
bool scan(const File& file, int64_t at, Members& members);

// Members of an index file; nothing if it is not one of version 1.2 or contradicts itself.
std::optional<Members> parse_index(std::string_view text);

// The index file for these members; nothing if there are none or a name has white space.
std::optional<std::string> index_text(const Members& members);

// The table of a shard, from its index file where that fits, else from the archive itself.
Shard load(const std::string& tar, const std::string& index);

} // namespace vlpfast::host
