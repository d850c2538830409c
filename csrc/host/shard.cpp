// Index files (DALI's wds2idx v1.2) and the table of a shard.
#include <algorithm>
#include <unordered_map>

#include "shard.h"

namespace vlpfast::host {
namespace {

// Cuts `text` at the next `mark` (or its end) and returns what comes before.
std::string_view take(std::string_view& text, char mark) {
    const size_t end = text.find(mark);
    const std::string_view part = text.substr(0, end);
    text = end == text.npos ? std::string_view() : text.substr(end + 1);
    return part;
}

// Whether the archive is complete, for an index that fits it; nothing for one that does not: members outside the file,
// other members at the first or the last place, or more members behind the last. Names over 100 bytes are all looked
// at, because DALI's tool places those of GNU archives wrongly.
std::optional<bool> fits(const Members& members, const File& file) {
    int64_t end = 0;
    for (size_t i = 0; i < members.names.size(); ++i) {
        const std::string& name = members.names[i];
        const int64_t offset = members.offsets[i], size = members.sizes[i];
        if (offset > file.size() || offset < end + block_size || offset % block_size || size > file.size() - offset)
            return std::nullopt;
        end = offset + size;
        if (i != 0 && i != members.names.size() - 1 && name.size() <= 100)
            continue;
        char block[block_size] = {};
        file.read(offset - block_size, block, block_size);
        const auto header = parse_header(block);
        if (!header || (header->kind != '0' && header->kind != '7' && header->kind != 0))
            return std::nullopt;
        if (size < int64_t{1} << 33 && header->size != size)
            return std::nullopt;
        const bool plain =
            name.size() <= 100 && std::all_of(name.begin(), name.end(), [](char c) { return (c & 0x80) == 0; });
        if (plain && header->name != name)
            return std::nullopt;
    }
    Members rest;
    try {
        const bool complete = scan(file, (end + block_size - 1) / block_size * block_size, rest);
        return rest.names.empty() ? std::optional(complete) : std::nullopt;
    } catch (const Damage&) {
        return std::nullopt;
    }
}

std::string lower(std::string_view text) {
    std::string out(text);
    for (char& c : out)
        if (c >= 'A' && c <= 'Z')
            c = static_cast<char>(c - 'A' + 'a');
    return out;
}

void fill(Shard& shard, Members&& members) {
    std::unordered_map<std::string, int32_t> ids;
    std::string_view previous;
    for (size_t i = 0; i < members.names.size(); ++i) {
        const auto [key, extension] = *split_name(members.names[i]);
        if (i == 0 || key != previous) {
            shard.keys += key;
            shard.key_ends.push_back(static_cast<int64_t>(shard.keys.size()));
            shard.sample_ends.push_back(0);
            previous = key;
        }
        shard.sample_ends.back() = static_cast<int64_t>(i) + 1;
        const auto [place, added] = ids.try_emplace(lower(extension), static_cast<int32_t>(ids.size()));
        if (added)
            shard.extensions.push_back(place->first);
        shard.extension_ids.push_back(place->second);
    }
    shard.offsets = std::move(members.offsets);
    shard.sizes = std::move(members.sizes);
}

// The index beside the archive, if it is there, can be read, and is not older than the archive.
std::string read_index(const std::string& path, const File& tar) {
    try {
        const File file(path);
        if (file.modified() < tar.modified())
            return {};
        std::string text(static_cast<size_t>(file.size()), 0);
        text.resize(static_cast<size_t>(file.read(0, text.data(), file.size())));
        return text;
    } catch (const FileError&) {
        return {};
    }
}

} // namespace

std::optional<Members> parse_index(std::string_view text) {
    if (text.empty() || text.back() != '\n')
        return std::nullopt;
    const int64_t samples = std::count(text.begin(), text.end(), '\n') - 1;
    if (samples < 1 || take(text, '\n') != "v1.2 " + std::to_string(samples))
        return std::nullopt;
    Members members;
    std::string_view previous;
    while (!text.empty()) {
        std::string_view line = take(text, '\n');
        if (line.ends_with(' '))
            return std::nullopt;
        bool first = true;
        do {
            const std::string_view extension = take(line, ' '), offset = take(line, ' '), size = take(line, ' ');
            const std::string_view name = take(line, ' ');
            const auto parts = split_name(name);
            const auto at = decimal(offset), length = decimal(size);
            const bool same_sample = !members.names.empty() && parts && parts->first == previous;
            if (!parts || parts->second != extension || same_sample == first || !at || !length)
                return std::nullopt;
            previous = parts->first;
            first = false;
            members.names.emplace_back(name);
            members.offsets.push_back(*at);
            members.sizes.push_back(*length);
        } while (!line.empty());
    }
    return members;
}

std::optional<std::string> index_text(const Members& members) {
    if (members.names.empty())
        return std::nullopt;
    std::string body;
    int64_t samples = 0;
    std::string_view previous;
    for (size_t i = 0; i < members.names.size(); ++i) {
        const std::string& name = members.names[i];
        if (name.find_first_of(" \t\n\r\v\f") != name.npos)
            return std::nullopt;
        const auto [key, extension] = *split_name(name);
        if (i > 0 && key == previous) {
            body.back() = ' ';
        } else {
            ++samples;
            previous = key;
        }
        body.append(extension).append(" ").append(std::to_string(members.offsets[i])).append(" ");
        body.append(std::to_string(members.sizes[i])).append(" ").append(name).append("\n");
    }
    return "v1.2 " + std::to_string(samples) + "\n" + body;
}

Shard load(const std::string& tar, const std::string& index) {
    const File file(tar);
    Shard shard;
    shard.file_size = file.size();
    if (auto members = parse_index(read_index(index, file))) {
        if (const auto complete = fits(*members, file)) {
            shard.complete = *complete;
            fill(shard, std::move(*members));
            return shard;
        }
    }
    Members members;
    try {
        shard.complete = scan(file, 0, members);
        shard.index = index_text(members);
    } catch (const Damage& damage) {
        shard.problem = damage.text + "; last whole member: " + (members.names.empty() ? "none" : members.names.back());
    }
    fill(shard, std::move(members));
    return shard;
}

} // namespace vlpfast::host
