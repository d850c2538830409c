#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "file.h"

namespace vlpfast::host {

struct Range {
    int64_t file; // position in the reader's paths
    int64_t offset;
    int64_t size; // bytes
    char* out;
};

// Byte ranges of many files. Keeps up to `max_open` of them open (the ones used last); more only while they are being
// read.
class Reader {
  public:
    Reader(std::vector<std::string> paths, size_t max_open) : paths_(std::move(paths)), max_open_(max_open) {}

    // Throws FileError with the path where a range cannot be read whole. May be called from several threads at once.
    void read(const std::vector<Range>& ranges, int threads);
    int64_t files() const { return static_cast<int64_t>(paths_.size()); }

  private:
    std::shared_ptr<const File> open(int64_t file);

    std::vector<std::string> paths_;
    size_t max_open_;
    std::mutex guard_;                                                  // of the two below
    std::list<std::pair<int64_t, std::shared_ptr<const File>>> recent_; // the one used last in front
    std::unordered_map<int64_t, decltype(recent_)::iterator> places_;
};

} // namespace vlpfast::host
