"""The 4-bit kernel against float32 matrix products, one thread, at the row counts of decoding and of prompts."""

import statistics
import time

import torch

from app.serving.int4 import matmul, pack

WIDTH, GROUP_SIZE, RUNS = 2048, 128, 15


def median_seconds(work: object, *arguments: torch.Tensor) -> float:
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work(*arguments)  # type: ignore[operator]
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def main() -> None:
    torch.set_num_threads(1)
    quantized = torch.randint(0, 16, (WIDTH, WIDTH))
    scales = torch.rand(WIDTH // GROUP_SIZE, WIDTH) * 0.01
    packed, scales_and_zeros = pack(quantized, scales, None)
    weight = torch.randn(WIDTH, WIDTH)
    print(f"{WIDTH} × {WIDTH}, group {GROUP_SIZE}: {weight.nbytes:,} bytes float32, {packed.nbytes:,} bytes packed")
    print("rows   float32 ms   int4 ms   float32 / int4")
    for num_rows in (1, 8, 32, 64, 256):
        x = torch.randn(num_rows, WIDTH)
        float32, int4 = median_seconds(lambda x: x @ weight.t(), x), median_seconds(matmul, x, packed, scales_and_zeros)
        print(f"{num_rows:4d}   {1e3 * float32:10.2f}   {1e3 * int4:7.2f}   {float32 / int4:.2f}")


if __name__ == "__main__":
    main()
