#include "reader.h"

#include "parallel.h"

namespace vlpfast::host {

std::shared_ptr<const File> Reader::open(int64_t file) {
    {
        const std::lock_guard lock(guard_);
        if (const auto place = places_.find(file); place != places_.end()) {
            recent_.splice(recent_.begin(), recent_, place->second);
            return place->second->second;
        }
    }
    // Opened without the lock: on a network file system this takes long. Two threads may open the same file; the second
    // copy then is short-lived.
    auto opened = std::make_shared<const File>(paths_[static_cast<size_t>(file)]);
    const std::lock_guard lock(guard_);
    if (!places_.contains(file)) {
        recent_.emplace_front(file, opened);
        places_[file] = recent_.begin();
        if (recent_.size() > max_open_) {
            places_.erase(recent_.back().first);
            recent_.pop_back();
        }
    }
    return opened;
}

void Reader::read(const std::vector<Range>& ranges, int threads) {
    parallel(static_cast<int64_t>(ranges.size()), threads, [&](int64_t i) {
        const Range& range = ranges[static_cast<size_t>(i)];
        const auto file = open(range.file);
        const int64_t got = file->read(range.offset, range.out, range.size);
        if (got < range.size)
            throw FileError{EIO,
                            "the file ends " + std::to_string(range.size - got) +
                                " bytes before the end of the range at byte " + std::to_string(range.offset),
                            file->path()};
    });
}

} // namespace vlpfast::host
