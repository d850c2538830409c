// An open file, read by position: safe to share between threads.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace vlpfast::host {

// Becomes Python's OSError(code, message, path).
struct FileError {
    int code;
    std::string message;
    std::string path;
};

class File {
  public:
    explicit File(const std::string& path) : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (descriptor_ < 0)
            fail();
        struct stat status;
        if (::fstat(descriptor_, &status) != 0) {
            const int code = errno;
            ::close(descriptor_);
            errno = code;
            fail();
        }
        size_ = status.st_size;
        modified_ = int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
    }
    ~File() { ::close(descriptor_); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    int64_t size() const { return size_; }
    int64_t modified() const { return modified_; } // nanoseconds
    const std::string& path() const { return path_; }

    // Fills `out` from byte `at` on. Less than `length` only at the end of the file.
    int64_t read(int64_t at, char* out, int64_t length) const {
        int64_t done = 0;
        while (done < length) {
            const ssize_t got = ::pread(descriptor_, out + done, static_cast<size_t>(length - done), at + done);
            if (got == 0)
                break;
            if (got < 0) {
                if (errno == EINTR)
                    continue;
                fail();
            }
            done += got;
        }
        return done;
    }

  private:
    [[noreturn]] void fail() const { throw FileError{errno, std::strerror(errno), path_}; }

    std::string path_;
    int descriptor_;
    int64_t size_ = 0;
    int64_t modified_ = 0;
};

} // namespace vlpfast::host
