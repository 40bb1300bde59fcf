// SPDX-License-Identifier: Apache-2.0
// Match two grey images with an exported graph (batch 1, no masks). C++17, onnxruntime's C++ interface.
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

// Grey values in [0, 1], row by row, from a binary PGM file (P5, 255) of exactly the graph's size.
std::vector<float> load_pgm(const std::string& path, int64_t height, int64_t width) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t columns = 0, rows = 0, largest = 0;
  if (!(file >> magic >> columns >> rows >> largest) || magic != "P5" || largest != 255)
    throw std::runtime_error(path + ": expected a binary PGM file with values up to 255");
  if (rows != height || columns != width)
    throw std::runtime_error(path + ": the size differs from the graph's");
  file.get();  // the one space after the header
  std::vector<unsigned char> bytes(static_cast<size_t>(rows * columns));
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size())))
    throw std::runtime_error(path + ": the file is too short");
  std::vector<float> grey(bytes.size());
  for (size_t i = 0; i < bytes.size(); ++i) grey[i] = static_cast<float>(bytes[i]) / 255.0f;
  return grey;
}

int main(int argc, char** argv) try {
  if (argc != 4) throw std::runtime_error("usage: onnx_client model.onnx image0.pgm image1.pgm");
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "eloftr");
  Ort::SessionOptions options;
  Ort::Session session(env, std::string(argv[1]).c_str(), options);  // on Windows: a wide string

  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::vector<float>> pixels(2);
  std::vector<Ort::Value> inputs;
  for (size_t side = 0; side < 2; ++side) {
    // The type's owner has to stay alive while its shape is read.
    auto type = session.GetInputTypeInfo(side);
    std::vector<int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();
    pixels[side] = load_pgm(argv[2 + side], shape[2], shape[3]);
    inputs.push_back(Ort::Value::CreateTensor<float>(memory, pixels[side].data(), pixels[side].size(),
                                                     shape.data(), shape.size()));
  }
  const char* in[] = {"image0", "image1"};
  const char* out[] = {"keypoints0", "keypoints1", "confidence", "valid"};
  auto outputs = session.Run(Ort::RunOptions{nullptr}, in, inputs.data(), 2, out, 4);

  const float* keypoints0 = outputs[0].GetTensorData<float>();
  const float* keypoints1 = outputs[1].GetTensorData<float>();
  const float* confidence = outputs[2].GetTensorData<float>();
  const bool* valid = outputs[3].GetTensorData<bool>();
  const int64_t rows = outputs[3].GetTensorTypeAndShapeInfo().GetShape()[1];
  for (int64_t i = 0; i < rows; ++i)
    if (valid[i])
      std::printf("%g,%g,%g,%g,%g\n", keypoints0[2 * i], keypoints0[2 * i + 1], keypoints1[2 * i],
                  keypoints1[2 * i + 1], confidence[i]);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
