// vlpfast._host: helpers of the data path and solvers, without tensors. All of them release the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "assignment.h"
#include "parallel.h"
#include "reader.h"
#include "shard.h"

namespace py = pybind11;
using namespace vlpfast::host;

namespace {

using Numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::vector<std::string> paths_of(const py::sequence& paths) {
    std::vector<std::string> out;
    for (const py::handle path : paths) {
        PyObject* bytes = nullptr;
        if (!PyUnicode_FSConverter(path.ptr(), &bytes))
            throw py::error_already_set();
        out.push_back(py::reinterpret_steal<py::bytes>(bytes));
    }
    return out;
}

// Names in archives need not be UTF-8.
py::str text(const std::string& bytes) {
    PyObject* out = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "backslashreplace");
    if (out == nullptr)
        throw py::error_already_set();
    return py::reinterpret_steal<py::str>(out);
}

// A view of the vector that keeps its owner alive.
template <class T> py::array_t<T> view(const std::vector<T>& values, const py::object& owner) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data(), owner);
}

template <class T> auto vector_of(const std::vector<T> Shard::* field) {
    return [field](const py::object& self) { return view(self.cast<const Shard&>().*field, self); };
}

std::vector<Shard> load_all(const py::sequence& tars, const py::sequence& indexes, int threads) {
    const auto tar_paths = paths_of(tars), index_paths = paths_of(indexes);
    if (tar_paths.size() != index_paths.size())
        throw py::value_error("expected as many index paths as archives");
    std::vector<Shard> shards(tar_paths.size());
    const py::gil_scoped_release release;
    parallel(static_cast<int64_t>(shards.size()), threads, [&](int64_t i) {
        const auto k = static_cast<size_t>(i);
        shards[k] = load(tar_paths[k], index_paths[k]);
    });
    return shards;
}

py::list read_ranges(Reader& reader, const Numbers& files, const Numbers& offsets, const Numbers& sizes, int threads) {
    const py::ssize_t count = files.size();
    if (files.ndim() != 1 || offsets.ndim() != 1 || sizes.ndim() != 1 || offsets.size() != count ||
        sizes.size() != count)
        throw py::value_error("files, offsets, sizes: expected three arrays of one dimension and one length");
    py::list out;
    std::vector<Range> ranges;
    for (py::ssize_t i = 0; i < count; ++i) {
        const Range range{files.at(i), offsets.at(i), sizes.at(i), nullptr};
        if (range.file < 0 || range.file >= reader.files() || range.offset < 0 || range.size < 0)
            throw py::value_error("files, offsets, sizes: range " + std::to_string(i) + " is not in the files");
        py::array_t<uint8_t> bytes(static_cast<py::ssize_t>(range.size));
        ranges.push_back({range.file, range.offset, range.size, reinterpret_cast<char*>(bytes.mutable_data())});
        out.append(std::move(bytes));
    }
    const py::gil_scoped_release release;
    reader.read(ranges, threads);
    return out;
}

template <class T> using Contiguous = py::array_t<T, py::array::c_style>;

template <class T>
py::array_t<int64_t> assign_all(const Contiguous<T>& similarity, const Contiguous<bool>& rows,
                                const Contiguous<bool>& columns, int threads) {
    if (similarity.ndim() != 3 || rows.ndim() != 2 || columns.ndim() != 2 || rows.shape(0) != similarity.shape(0) ||
        columns.shape(0) != similarity.shape(0) || rows.shape(1) != similarity.shape(1) ||
        columns.shape(1) != similarity.shape(2))
        throw py::value_error("similarity, rows, columns: expected shapes [B, P, T], [B, P], [B, T]");
    py::array_t<int64_t> partner({columns.shape(0), columns.shape(1)});
    int64_t* const out = partner.mutable_data();
    const py::gil_scoped_release release;
    assign(similarity.shape(0), similarity.shape(1), similarity.shape(2), similarity.data(), rows.data(),
           columns.data(), out, threads);
    return partner;
}

template <class T> void define_assign(py::module_& module) {
    module.def(
        "assign", &assign_all<T>, py::arg("similarity").noconvert(), py::arg("rows").noconvert(),
        py::arg("columns").noconvert(), py::arg("threads"),
        "similarity float32 or float64 [B, P, T], rows bool [B, P], columns bool [B, T], C-contiguous. int64 [B, T]: "
        "the row of each column in the one-to-one matching of the largest sum, -1 for none.");
}

} // namespace

PYBIND11_MODULE(_host, module) {
    module.doc() = "Tar shards and byte ranges (vlpfast/data/_tar.py is the same in plain Python), linear assignment.";

    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown)
                std::rethrow_exception(thrown);
        } catch (const FileError& error) {
            const auto path = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.path.c_str()));
            PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code, error.message, path).ptr());
        }
    });

    py::class_<Shard>(module, "Shard")
        .def_property_readonly("offsets", vector_of(&Shard::offsets))
        .def_property_readonly("sizes", vector_of(&Shard::sizes))
        .def_property_readonly("extension_ids", vector_of(&Shard::extension_ids))
        .def_property_readonly("sample_ends", vector_of(&Shard::sample_ends))
        .def_property_readonly("key_ends", vector_of(&Shard::key_ends))
        .def_property_readonly("keys", [](const Shard& shard) { return py::bytes(shard.keys); })
        .def_property_readonly("extensions",
                               [](const Shard& shard) {
                                   py::list out;
                                   for (const std::string& extension : shard.extensions)
                                       out.append(text(extension));
                                   return out;
                               })
        .def_readonly("file_size", &Shard::file_size)
        .def_property_readonly("problem", [](const Shard& shard) { return text(shard.problem); })
        .def_readonly("complete", &Shard::complete)
        .def_property_readonly("index", [](const Shard& shard) -> py::object {
            return shard.index ? py::object(py::bytes(*shard.index)) : py::none();
        });

    module.def("load", &load_all, py::arg("tars"), py::arg("indexes"), py::arg("threads"),
               "The table of each tar, from the index file where that fits, else from the archive itself.");

    py::class_<Reader>(module, "Reader", "Byte ranges of many files; keeps up to max_open of them open.")
        .def(py::init([](const py::sequence& paths, size_t max_open) {
                 return std::make_unique<Reader>(paths_of(paths), max_open);
             }),
             py::arg("paths"), py::arg("max_open"))
        .def("read", &read_ranges, py::arg("files"), py::arg("offsets"), py::arg("sizes"), py::arg("threads"),
             "files, offsets, sizes: int64 [N]. N uint8 arrays; OSError with the path where a range cannot be read "
             "whole.");

    define_assign<float>(module);
    define_assign<double>(module);
}
