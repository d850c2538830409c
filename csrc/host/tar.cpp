// Tar archives: ustar with GNU long names and base-256 numbers, and PAX records.
#include <algorithm>
#include <array>

#include "shard.h"

namespace vlpfast::host {
namespace {

constexpr int64_t longest_extended = 1 << 20; // bytes of a long-name or PAX record; a larger one is damage

int64_t round_up(int64_t bytes) {
    return (bytes + block_size - 1) / block_size * block_size;
}

std::string_view until_zero(const char* text, size_t length) {
    return {text, strnlen(text, length)};
}

bool all_zero(const char* block, int64_t length) {
    return std::all_of(block, block + length, [](char byte) { return byte == 0; });
}

std::optional<int64_t> number(const char* text, int length) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(text);
    uint64_t value = 0;
    if (bytes[0] == 0x80) {
        for (int i = 1; i < length; ++i) {
            if (value >> 55)
                return std::nullopt;
            value = value << 8 | bytes[i];
        }
        return static_cast<int64_t>(value);
    }
    const auto pad = [](char byte) { return byte == ' ' || byte == 0; };
    const char* end = text + length;
    while (end > text && pad(end[-1]))
        --end;
    while (text < end && pad(*text))
        ++text;
    for (; text < end; ++text) {
        if (*text < '0' || *text > '7')
            return std::nullopt;
        value = value << 3 | static_cast<uint64_t>(*text - '0');
    }
    return static_cast<int64_t>(value);
}

// The records of PAX headers that matter here.
struct Records {
    std::optional<std::string> path;
    std::optional<int64_t> size;
    bool sparse = false;
    bool any() const { return path || size || sparse; }
};

bool read_pax(std::string_view content, Records& records) {
    while (!content.empty()) {
        const size_t space = content.substr(0, 10).find(' ');
        const auto length = space == content.npos ? std::nullopt : decimal(content.substr(0, space));
        if (!length || *length > static_cast<int64_t>(content.size()))
            return false;
        const std::string_view record = content.substr(0, static_cast<size_t>(*length));
        const size_t equals = record.find('=', std::min(space, record.size()));
        if (equals == record.npos || record.back() != '\n')
            return false;
        const std::string_view name = record.substr(space + 1, equals - space - 1);
        const std::string_view value = record.substr(equals + 1, record.size() - equals - 2);
        if (name == "path") {
            records.path = value;
        } else if (name == "size") {
            records.size = decimal(value);
            if (!records.size)
                return false;
        } else if (name.starts_with("GNU.sparse.")) {
            records.sparse = true;
        }
        content.remove_prefix(record.size());
    }
    return true;
}

// Headers of small members lie close together: one read serves several.
class Window {
  public:
    explicit Window(const File& file) : file_(file) {}

    // Up to a block from byte `at` on; valid until the next call.
    std::string_view block(int64_t at) {
        if (at < start_ || at + block_size > start_ + length_) {
            start_ = at;
            length_ = file_.read(at, bytes_.data(), static_cast<int64_t>(bytes_.size()));
        }
        return {bytes_.data() + (at - start_), static_cast<size_t>(std::min(block_size, start_ + length_ - at))};
    }

  private:
    const File& file_;
    int64_t start_ = 0;
    int64_t length_ = 0;
    std::array<char, 16 * block_size> bytes_;
};

bool is_one_of(char kind, std::string_view kinds) {
    return kinds.find(kind) != kinds.npos;
}

constexpr std::string_view regular("07\0", 3);

} // namespace

std::optional<int64_t> decimal(std::string_view text) {
    if (text.empty() || text.size() > 18)
        return std::nullopt;
    int64_t value = 0;
    for (const char digit : text) {
        if (digit < '0' || digit > '9')
            return std::nullopt;
        value = value * 10 + (digit - '0');
    }
    return value;
}

std::optional<std::pair<std::string_view, std::string_view>> split_name(std::string_view name) {
    const size_t base = name.rfind('/') + 1; // npos + 1 is 0
    const size_t dot = name.find('.', base);
    if (dot == name.npos || dot == base || dot == name.size() - 1)
        return std::nullopt;
    return std::pair(name.substr(0, dot), name.substr(dot + 1));
}

std::optional<Header> parse_header(const char* block) {
    const auto stated = number(block + 148, 8);
    const auto size = number(block + 124, 12);
    int64_t sum = 0, signed_sum = 0; // the second is what some old programs wrote
    for (int i = 0; i < block_size; ++i) {
        const char byte = i >= 148 && i < 156 ? ' ' : block[i];
        sum += static_cast<unsigned char>(byte);
        signed_sum += static_cast<signed char>(byte);
    }
    if (!stated || !size || (*stated != sum && *stated != signed_sum))
        return std::nullopt;
    std::string name(until_zero(block, 100));
    if (std::string_view(block + 257, 6) == std::string_view("ustar\0", 6) && block[345] != 0)
        name = std::string(until_zero(block + 345, 155)) + "/" + name;
    return Header{std::move(name), block[156], *size};
}

bool scan(const File& file, int64_t at, Members& members) {
    Window window(file);
    const auto where = [](int64_t byte) { return " at byte " + std::to_string(byte); };
    const int64_t end = file.size();
    Records always, once;
    std::optional<std::string> long_name;
    while (at < end) {
        std::string_view block = window.block(at);
        if (all_zero(block.data(), static_cast<int64_t>(block.size()))) {
            const bool whole = block.size() == block_size;
            const std::string_view rest = window.block(at + block_size);
            if (!all_zero(rest.data(), static_cast<int64_t>(rest.size())))
                throw Damage{"damaged header" + where(at)};
            return whole && rest.size() == block_size;
        }
        if (block.size() < block_size && at > 0)
            throw Damage{"cut short inside the header" + where(at)};
        const auto header = block.size() < block_size ? std::nullopt : parse_header(block.data());
        if (!header)
            throw Damage{at == 0 ? "not a tar archive" : "damaged header" + where(at)};
        char kind = header->kind;
        int64_t data = at + block_size;
        if (kind == 'S') // the map of an old GNU sparse file may go on behind its header
            for (bool more = block[482]; more; data += block_size) {
                block = window.block(data);
                if (block.size() < block_size)
                    throw Damage{"cut short inside the header" + where(at)};
                more = block[504];
            }
        if (is_one_of(kind, regular) && once.sparse)
            kind = 'S'; // its data is not the file's bytes
        int64_t size = header->size;
        if (is_one_of(kind, "123456"))
            size = 0;
        else if (!is_one_of(kind, "xgLK"))
            size = once.size.value_or(always.size.value_or(size));
        if (size > end - data)
            throw Damage{"cut short inside the member" + where(at)};
        at = data + round_up(size);
        if (is_one_of(kind, "xgLK")) {
            if (size > longest_extended)
                throw Damage{"damaged header" + where(data - block_size)};
            std::string content(static_cast<size_t>(size), 0);
            content.resize(static_cast<size_t>(file.read(data, content.data(), size)));
            if (kind == 'L')
                long_name = until_zero(content.data(), content.size());
            else if (kind != 'K' && !read_pax(content, kind == 'x' ? once : always))
                throw Damage{"damaged header" + where(data - block_size)};
            continue;
        }
        std::string name = once.path ? *once.path : long_name ? *long_name : always.path ? *always.path : header->name;
        if (is_one_of(kind, regular) && split_name(name)) {
            members.names.push_back(std::move(name));
            members.offsets.push_back(data);
            members.sizes.push_back(size);
        }
        once = {};
        long_name.reset();
    }
    if (once.any() || long_name)
        throw Damage{"cut short after the header" + where(at - block_size)};
    return false;
}

} // namespace vlpfast::host
