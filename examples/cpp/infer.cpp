// Runs a model that `gtp-vit export --format aoti` wrote, without Python: a batch of images from a raw file, logits to
// another one. Usage: see kUsage, and README.md.

#include <dlfcn.h>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr const char* kUsage =
    "usage: gtp_infer MODEL.pt2 LIBRARY INPUT BATCH HEIGHT WIDTH OUTPUT\n"
    "  MODEL.pt2  from gtp-vit export --format aoti, for float32\n"
    "  LIBRARY    libgtp_kernels.so\n"
    "  INPUT      float32, BATCH x 3 x HEIGHT x WIDTH values, as the model takes them\n"
    "  OUTPUT     float32, BATCH rows of logits\n";

int64_t size_of(const char* text, const char* name) {
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 1 || value > (int64_t{1} << 20)) {
    throw std::runtime_error(std::string(name) + " must be a number from 1 to 1048576; got " + text);
  }
  return value;
}

std::vector<float> read_floats(const std::string& path, size_t count) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  const auto bytes = static_cast<uint64_t>(file.tellg());
  if (bytes != count * sizeof(float)) {
    throw std::runtime_error(path + ": needed " + std::to_string(count * sizeof(float)) + " bytes, found " +
                             std::to_string(bytes));
  }
  std::vector<float> values(count);
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(bytes));
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return values;
}

// What torch throws carries a stack trace behind its first line.
std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

void check_package(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[4] = {};
  if (!file.read(magic, 4)) throw std::runtime_error(path + ": cannot be opened, or is empty");
  if (std::string(magic, 2) != "PK") {
    throw std::runtime_error(path +
                             ": not a package, which is a zip archive; write one with gtp-vit export --format aoti");
  }
  // torch's loader ends the process where an archive has no compiled model. Entries are named as they are.
  std::string rest((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (rest.find(".wrapper.so") == std::string::npos) {
    throw std::runtime_error(path +
                             ": an archive without a compiled model; write one with gtp-vit export --format aoti");
  }
}

// The package looks at no shape itself: it would read beyond the images. `takes` is "batch 3 224 224 float32", or a
// number in place of "batch".
void check_shape(const std::string& takes, int64_t batch, int64_t height, int64_t width) {
  const std::string rest = " 3 " + std::to_string(height) + " " + std::to_string(width) + " float32";
  if (takes != "batch" + rest && takes != std::to_string(batch) + rest) {
    throw std::runtime_error("the package takes images of \"" + takes + "\"");
  }
  if (batch > 4096) throw std::runtime_error("the package takes at most 4096 images at once");
}

void run(char** argument) {
  const std::string model = argument[1], library = argument[2], input = argument[3], output = argument[7];
  const int64_t batch = size_of(argument[4], "BATCH"), height = size_of(argument[5], "HEIGHT");
  const int64_t width = size_of(argument[6], "WIDTH");
  std::vector<float> pixels = read_floats(input, static_cast<size_t>(batch * 3 * height * width));

  // Its initialisers register the operators that the package calls.
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw std::runtime_error(std::string("libgtp_kernels does not load: ") + dlerror());
  }

  check_package(model);
  try {
    torch::inductor::AOTIModelPackageLoader package(model);
    auto metadata = package.get_metadata();
    if (metadata.count("gtp_vit") == 0) {
      throw std::runtime_error("a package of another program; needed is one that gtp-vit export wrote");
    }
    std::cout << "model: " << metadata["gtp_vit"] << "\n";
    check_shape(metadata["gtp_vit_images"], batch, height, width);
    const std::vector<at::Tensor> outputs =
        package.run({at::from_blob(pixels.data(), {batch, 3, height, width}, at::kFloat)});
    const at::Tensor logits = outputs.at(0).to(at::kCPU, at::kFloat).contiguous();
    std::ofstream file(output, std::ios::binary);
    file.write(static_cast<const char*>(logits.const_data_ptr()), static_cast<std::streamsize>(logits.nbytes()));
    if (!file.flush()) throw std::runtime_error(output + ": cannot be written");
    std::cout << "logits: " << logits.sizes() << " in " << output << "\n";
  } catch (const std::exception& error) {
    throw std::runtime_error(model + ", images [" + std::to_string(batch) + ", 3, " + std::to_string(height) + ", " +
                             std::to_string(width) + "]: " + first_line(error));
  }
}

}  // namespace

int main(int count, char** argument) {
  if (count != 8) {
    std::cerr << kUsage;
    return 2;
  }
  try {
    run(argument);
  } catch (const std::exception& error) {
    std::cerr << "gtp_infer: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
