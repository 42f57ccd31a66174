/** Writes an answer as UTF-8 directly into the memory from which the agent reads it. */

const QUOTE: u32 = 0x22;
const BACKSLASH: u32 = 0x5c;

/** The number of UTF-16 units between two capacity checks, because a check per unit is slow. */
const STEP: usize = 4096;

/** The maximum number of bytes per unit: an escape such as `\u001f`. */
const MOST_PER_UNIT: usize = 6;

/** The initial capacity, enough for the answers of most policies. */
const FIRST_ROOM: usize = 256;

const BASE64: usize = memory.data<u8>([
  0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x4b, 0x4c, 0x4d, 0x4e, 0x4f, 0x50, 0x51, 0x52, 0x53,
  0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b, 0x6c,
  0x6d, 0x6e, 0x6f, 0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x30, 0x31, 0x32, 0x33, 0x34,
  0x35, 0x36, 0x37, 0x38, 0x39, 0x2b, 0x2f,
]);

/** Text in memory that is not garbage-collected. The caller of `take` owns it. */
export class Writer {
  private start: usize = heap.alloc(FIRST_ROOM);
  private room: usize = FIRST_ROOM;
  private used: usize = 0;

  get size(): usize {
    return this.used;
  }

  /** Returns the text. The writer must not be used afterwards. */
  take(): usize {
    return this.start;
  }

  /** Returns the text as a string. The writer must not be used afterwards. */
  takeString(): string {
    const text = String.UTF8.decodeUnsafe(this.start, this.used);
    heap.free(this.start);
    return text;
  }

  /** Reserves `size` bytes and returns their address. */
  private reserve(size: usize): usize {
    const needed = this.used + size;
    if (needed > this.room) {
      // Doubling keeps the total size of all copies below that of the text.
      this.room = max(needed, this.room << 1);
      this.start = heap.realloc(this.start, this.room);
    }
    return this.start + this.used;
  }

  byte(code: u8): void {
    store<u8>(this.reserve(1), code);
    this.used++;
  }

  /** Writes text as is, such as complete JSON. An unpaired surrogate becomes U+FFFD. */
  raw(text: string): void {
    this.write(text, false);
  }

  /** Writes text as a JSON string. */
  quoted(text: string): void {
    this.byte(<u8>QUOTE);
    this.write(text, true);
    this.byte(<u8>QUOTE);
  }

  private write(text: string, escaping: bool): void {
    let from = changetype<usize>(text);
    const end = from + ((<usize>text.length) << 1);
    while (from < end) {
      // A surrogate pair may extend one unit beyond the step.
      const stop = min(end, from + (STEP << 1));
      const start = this.reserve((((stop - from) >> 1) + 1) * MOST_PER_UNIT);
      let to = start;
      while (from < stop) {
        let code: u32 = load<u16>(from);
        from += 2;
        if (code < 0x80) {
          if (!escaping || (code >= 0x20 && code != QUOTE && code != BACKSLASH)) {
            store<u8>(to++, code);
          } else {
            to = escape(to, code);
          }
        } else if (code < 0x800) {
          store<u8>(to, 0xc0 | (code >> 6));
          store<u8>(to, 0x80 | (code & 0x3f), 1);
          to += 2;
        } else if (isHigh(code) && from < end && isLow(load<u16>(from))) {
          to = putPair(to, code, load<u16>(from));
          from += 2;
        } else {
          if (isHigh(code) || isLow(code)) code = 0xfffd;
          to = putThree(to, code);
        }
      }
      this.used += to - start;
    }
  }

  /** Writes bytes as base64, with the standard alphabet of RFC 4648 and padding. */
  base64(bytes: Uint8Array): void {
    let from = bytes.dataStart;
    const end = from + bytes.length;
    const start = this.reserve((((<usize>bytes.length) + 2) / 3) * 4);
    let to = start;
    for (; from + 3 <= end; from += 3, to += 4) {
      putGroup(to, ((<u32>load<u8>(from)) << 16) | ((<u32>load<u8>(from, 1)) << 8) | load<u8>(from, 2));
    }
    if (from < end) {
      const two = from + 1 < end;
      putGroup(to, ((<u32>load<u8>(from)) << 16) | (two ? (<u32>load<u8>(from, 1)) << 8 : 0));
      if (!two) store<u8>(to, 0x3d, 2);
      store<u8>(to, 0x3d, 3);
      to += 4;
    }
    this.used += to - start;
  }
}

/** Writes the three bytes of a code point from U+0800 to U+FFFF. */
export function putThree(to: usize, code: u32): usize {
  store<u8>(to, 0xe0 | (code >> 12));
  store<u8>(to, 0x80 | ((code >> 6) & 0x3f), 1);
  store<u8>(to, 0x80 | (code & 0x3f), 2);
  return to + 3;
}

/** Writes the four bytes of a surrogate pair. */
export function putPair(to: usize, high: u32, low: u32): usize {
  const code = 0x10000 + ((high & 0x3ff) << 10) + (low & 0x3ff);
  store<u8>(to, 0xf0 | (code >> 18));
  store<u8>(to, 0x80 | ((code >> 12) & 0x3f), 1);
  store<u8>(to, 0x80 | ((code >> 6) & 0x3f), 2);
  store<u8>(to, 0x80 | (code & 0x3f), 3);
  return to + 4;
}

export function isHigh(unit: u32): bool {
  return (unit & 0xfc00) == 0xd800;
}

export function isLow(unit: u32): bool {
  return (unit & 0xfc00) == 0xdc00;
}

function escape(to: usize, code: u32): usize {
  store<u8>(to, BACKSLASH);
  if (code == QUOTE || code == BACKSLASH) {
    store<u8>(to, code, 1);
    return to + 2;
  }
  store<u32>(to, 0x30_30_75, 1); // u00
  store<u8>(to, 0x30 + (code >> 4), 4);
  const digit = code & 15;
  store<u8>(to, digit < 10 ? 0x30 + digit : 0x61 - 10 + digit, 5);
  return to + 6;
}

function putGroup(to: usize, bits: u32): void {
  store<u8>(to, load<u8>(BASE64 + (bits >> 18)));
  store<u8>(to, load<u8>(BASE64 + ((bits >> 12) & 63)), 1);
  store<u8>(to, load<u8>(BASE64 + ((bits >> 6) & 63)), 2);
  store<u8>(to, load<u8>(BASE64 + (bits & 63)), 3);
}
