"""What a network does, seen by an ordinary program: round trips, loss and throughput.

    python -m tests.netlab --devices 2 --profile wifi --until d1 -- \\
        sh -c '[ {name} = d1 ] && set 10.77.0.2; exec python -m tests.netlab.probe "$@"'

Without an address it serves: echoes datagrams, and reads TCP streams, answering one byte at the end
of each. With one it measures and prints JSON.
"""

import json
import select
import socket
import statistics
import sys
import threading
import time

PORT = 5999
CHUNK = bytes(1 << 16)


def serve() -> None:
    """For ever."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("", PORT))
    threading.Thread(target=drain, name="probe.tcp", daemon=True).start()
    while True:
        data, address = udp.recvfrom(65536)
        udp.sendto(data, address)


def drain() -> None:
    with socket.create_server(("", PORT)) as listener:
        while True:
            connection, _address = listener.accept()
            with connection:
                while connection.recv(1 << 18):
                    pass
                connection.sendall(b".")


def round_trips_s(host: str, count: int, size: int = 64, wait_s: float = 1.0) -> list[float]:
    """One datagram after the other; those that do not come back are missing from the list."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, PORT))
        for number in range(count):
            sent_s = time.monotonic()
            try:
                sock.send(number.to_bytes(4, "big") + bytes(size - 4))
                while select.select([sock], [], [], max(0, sent_s + wait_s - time.monotonic()))[0]:
                    if sock.recv(65536)[:4] == number.to_bytes(4, "big"):
                        found.append(time.monotonic() - sent_s)
                        break
            except ConnectionRefusedError:  # not up yet
                time.sleep(0.05)
    return found


def stream_s(host: str, size: int) -> float:
    """Seconds until the other side has read `size` bytes from a new TCP connection."""
    started_s = time.monotonic()
    with socket.create_connection((host, PORT)) as sock:
        left = size
        while left > 0:
            left -= sock.send(CHUNK[: min(left, len(CHUNK))])
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
    return time.monotonic() - started_s


def main(host: str) -> None:
    while not round_trips_s(host, 1):
        pass
    trips_ms = sorted(trip * 1000 for trip in round_trips_s(host, 300))
    size = 1 << 24
    print(
        json.dumps(
            {
                "rtt_ms": {
                    "min": round(trips_ms[0], 3),
                    "median": round(statistics.median(trips_ms), 3),
                    "p99": round(trips_ms[int(len(trips_ms) * 0.99)], 3),
                },
                "lost": 300 - len(trips_ms),
                "tcp_mbit_per_s": round(size * 8 / stream_s(host, size) / 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) > 1 else serve()
