// Runs an encoder that `spcxr export --format aoti` compiled, without Python.
//
//   encode PACKAGE IMAGE [OPERATORS]
//
// IMAGE is a binary PGM (P5, 8 or 16 bit) of the model's own size, already prepared as export.json
// says. OPERATORS is spcxr/_native_ops.so, for a package that carries spcxr's operators. Prints the
// cls feature, a number a line.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cctype>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>

namespace {

// The next number of a PGM header; comments go from # to the end of the line.
int64_t header_number(std::istream& file) {
  while (std::isspace(file.peek()) || file.peek() == '#') {
    if (file.get() == '#') file.ignore(1 << 20, '\n');
  }
  int64_t number = 0;
  if (!(file >> number) || number <= 0) throw std::runtime_error("the PGM header is not whole");
  return number;
}

// [1, channels, H, W] float32 in [0, 1]: the same grey in every channel.
at::Tensor read_pgm(const std::string& path, int64_t channels) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened; check the name");
  std::string magic(2, ' ');
  if (!file.read(magic.data(), 2) || magic != "P5") {
    throw std::runtime_error(path + ": no binary PGM (P5); convert it");
  }
  const int64_t width = header_number(file), height = header_number(file);
  const int64_t white = header_number(file), bytes = white > 255 ? 2 : 1;
  file.get();  // the one white space after the header
  std::string raw(static_cast<size_t>(width * height * bytes), '\0');
  if (!file.read(raw.data(), static_cast<std::streamsize>(raw.size()))) {
    throw std::runtime_error(path + ": cut short; copy it again");
  }
  at::Tensor grey = at::empty({1, 1, height, width}, at::kFloat);
  float* out = grey.mutable_data_ptr<float>();
  const auto* in = reinterpret_cast<const unsigned char*>(raw.data());
  for (int64_t i = 0; i < width * height; ++i) {
    const int level = bytes == 1 ? in[i] : in[2 * i] * 256 + in[2 * i + 1];
    out[i] = static_cast<float>(level) / static_cast<float>(white);
  }
  return grey.expand({1, channels, height, width}).contiguous();
}

int run(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: encode PACKAGE IMAGE [OPERATORS]\n");
    return 2;
  }
  if (argc == 4 && dlopen(argv[3], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw std::runtime_error(dlerror());
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const auto facts = model.get_metadata();  // each as JSON, the same as in export.json
  for (const char* fact : {"batch", "channels", "image_px"}) {
    if (!facts.contains(fact)) {
      throw std::runtime_error(std::string(argv[1]) + ": does not say its " + fact +
                               "; make it with spcxr export --format aoti");
    }
  }
  if (facts.at("batch") != "null" && facts.at("batch") != "1") {
    throw std::runtime_error(std::string(argv[1]) + ": takes " + facts.at("batch") +
                             " images at once, not one; export it without --batch-size");
  }
  const at::Tensor image = read_pgm(argv[2], std::stoll(facts.at("channels")));
  // A compiled model believes what it is given: another size is read past its end.
  const std::string size =
      "[" + std::to_string(image.size(2)) + ", " + std::to_string(image.size(3)) + "]";
  if (size != facts.at("image_px")) {
    throw std::runtime_error(std::string(argv[2]) + ": [height, width] is " + size +
                             ", the model's " + facts.at("image_px") + "; resize it");
  }
  const at::Tensor cls = model.run({image})[0].contiguous();
  const float* feature = cls.const_data_ptr<float>();
  for (int64_t i = 0; i < cls.numel(); ++i) std::printf("%.9g\n", feature[i]);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    const std::string said = error.what();
    std::fprintf(stderr, "error: %s\n", said.substr(0, said.find('\n')).c_str());
    return 1;
  }
}
