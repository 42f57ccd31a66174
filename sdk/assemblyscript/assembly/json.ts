/**
 * Reads JSON in place. A document is validated once. Its values are slices of it, and text becomes
 * a string only on access.
 */

import { decode } from "./base64";
import { Writer, isHigh, isLow, putPair, putThree } from "./writer";

const QUOTE: u8 = 0x22;
const BACKSLASH: u8 = 0x5c;
const COMMA: u8 = 0x2c;
const COLON: u8 = 0x3a;
const OPEN_OBJECT: u8 = 0x7b;
const CLOSE_OBJECT: u8 = 0x7d;
const OPEN_ARRAY: u8 = 0x5b;
const CLOSE_ARRAY: u8 = 0x5d;
const MINUS: u8 = 0x2d;
const PLUS: u8 = 0x2b;
const POINT: u8 = 0x2e;

/** Exceeds the depth of any event. The list of open containers replaces recursion. */
const MAX_DEPTH: i32 = 1024;
const openContainers = new StaticArray<u8>(MAX_DEPTH);

/** A value of a document. A missing value is empty. */
export class Value {
  constructor(
    readonly start: usize,
    readonly end: usize,
  ) {}

  /** Parses a document that is a single object. Aborts the call if it is anything else. */
  static parse(start: usize, length: usize): Value {
    const scanner = new Scanner(start, start + length);
    const value = scanner.value();
    scanner.skipSpace();
    if (scanner.at != scanner.end || !value.isObject) invalid();
    return value;
  }

  get exists(): bool {
    return this.end > this.start;
  }

  get isObject(): bool {
    return this.first == OPEN_OBJECT;
  }

  get isText(): bool {
    return this.first == QUOTE;
  }

  private get first(): u8 {
    return this.exists ? load<u8>(this.start) : 0;
  }

  /** The text; empty if the value is not a string. */
  get text(): string {
    return this.isText ? unescape(this.start + 1, this.end - 1) : "";
  }

  /** The text as UTF-8; empty if the value is not a string. */
  get utf8(): Uint8Array {
    return this.isText ? unescapeBytes(this.start + 1, this.end - 1) : new Uint8Array(0);
  }

  /** The text decoded as base64. Aborts the call if it is invalid base64. */
  get base64(): Uint8Array {
    if (!this.isText) return new Uint8Array(0);
    const start = this.start + 1;
    const end = this.end - 1;
    if (find(BACKSLASH, start, end) == end) return decode(start, end);
    const digits = unescapeBytes(start, end);
    return decode(digits.dataStart, digits.dataStart + digits.length);
  }

  /** Whether the value is true. */
  get flag(): bool {
    return this.first == 0x74;
  }

  /** The value if it is a non-negative integer that fits, else `otherwise`. */
  number(otherwise: u64): u64 {
    let number: u64 = 0;
    for (let at = this.start; at < this.end; at++) {
      const digit = load<u8>(at);
      if (!isDigit(digit)) return otherwise;
      const unit = <u64>(digit - 0x30);
      if (number > (u64.MAX_VALUE - unit) / 10) return otherwise;
      number = number * 10 + unit;
    }
    return this.exists ? number : otherwise;
  }

  /** The last member of this name. */
  get(name: string, ignoringCase: bool = false): Value {
    let found = new Value(0, 0);
    const each = new Members(this);
    while (each.next()) {
      if (each.isNamed(name, ignoringCase)) found = each.value;
    }
    return found;
  }

  /** The elements of an array. */
  get elements(): Value[] {
    const elements: Value[] = [];
    const each = new Members(this);
    while (each.next()) elements.push(each.value);
    return elements;
  }
}

/** Iterates over the members of an object or the elements of an array. */
export class Members {
  private scanner: Scanner;
  private named: bool;
  private nameStart: usize = 0;
  private nameEnd: usize = 0;
  value: Value = new Value(0, 0);

  constructor(container: Value) {
    this.scanner = new Scanner(container.start, container.end);
    const first = this.scanner.peek();
    this.named = first == OPEN_OBJECT;
    // A value that is not a container has no members.
    this.scanner.at = this.named || first == OPEN_ARRAY ? container.start + 1 : container.end;
  }

  get name(): string {
    return unescape(this.nameStart, this.nameEnd);
  }

  next(): bool {
    const scanner = this.scanner;
    scanner.skipSpace();
    scanner.take(COMMA);
    scanner.skipSpace();
    const first = scanner.peek();
    if (first == 0 || first == CLOSE_OBJECT || first == CLOSE_ARRAY) return false;
    if (this.named) {
      this.nameStart = scanner.at + 1;
      scanner.string();
      this.nameEnd = scanner.at - 1;
      scanner.skipSpace();
      scanner.take(COLON);
    }
    this.value = scanner.value();
    return true;
  }

  /** Compares without allocating a string, if the name is ASCII without escapes. */
  isNamed(name: string, ignoringCase: bool): bool {
    const size = <i32>(this.nameEnd - this.nameStart);
    if (size < name.length) return false;
    let at = 0;
    for (; at < size && at < name.length; at++) {
      const byte = load<u8>(this.nameStart + at);
      if (byte == BACKSLASH || byte >= 0x80) {
        const decoded = this.name;
        return ignoringCase ? decoded.toLowerCase() == name.toLowerCase() : decoded == name;
      }
      const code = <u32>name.charCodeAt(at);
      if (byte != code && !(ignoringCase && lower(byte) == lower(code))) return false;
    }
    return at == size;
  }
}

class Scanner {
  constructor(
    public at: usize,
    readonly end: usize,
  ) {}

  peek(): u8 {
    return this.at < this.end ? load<u8>(this.at) : 0;
  }

  take(byte: u8): bool {
    if (this.peek() != byte) return false;
    this.at++;
    return true;
  }

  skipSpace(): void {
    while (true) {
      const byte = this.peek();
      if (byte != 0x20 && byte != 0x0a && byte != 0x0d && byte != 0x09) return;
      this.at++;
    }
  }

  /**
   * Scans the next value, including all nested values. It does not recurse, because the stack is
   * small.
   */
  value(): Value {
    this.skipSpace();
    const start = this.at;
    let depth = 0;
    do {
      depth = this.descend(depth);
      depth = this.ascend(depth);
    } while (depth > 0);
    return new Value(start, this.at);
  }

  /** Enters nested containers until the first value that is a scalar or empty, and skips it. */
  private descend(depth: i32): i32 {
    while (true) {
      this.skipSpace();
      const first = this.peek();
      if (first == QUOTE) {
        this.string();
        return depth;
      }
      if (first != OPEN_OBJECT && first != OPEN_ARRAY) {
        this.scalar();
        return depth;
      }
      // In ASCII, the code of a closing bracket or brace is that of the opening one plus two.
      const close = first + 2;
      this.at++;
      this.skipSpace();
      if (this.take(close)) return depth;
      if (depth == MAX_DEPTH) throw new Error("the event is nested deeper than 1024 levels");
      openContainers[depth++] = close;
      if (close == CLOSE_OBJECT) this.name();
    }
  }

  /** Leaves the containers that end here, until one that continues. */
  private ascend(depth: i32): i32 {
    for (; depth > 0; depth--) {
      const close = openContainers[depth - 1];
      this.skipSpace();
      if (this.take(COMMA)) {
        if (close == CLOSE_OBJECT) this.name();
        break;
      }
      if (!this.take(close)) invalid();
    }
    return depth;
  }

  string(): void {
    if (!this.take(QUOTE)) invalid();
    while (this.at < this.end) {
      this.skipPlain();
      const byte = load<u8>(this.at++);
      if (byte == QUOTE) return;
      if (byte < 0x20) invalid();
      if (byte == BACKSLASH) this.escape();
    }
    invalid();
  }

  /**
   * Skips plain text eight bytes at a time. The next byte need not be a special one: the caller
   * checks it.
   */
  private skipPlain(): void {
    let at = this.at;
    // The highest bit of each byte is set if it is a control character, a quote or a backslash.
    // Bytes above the first such byte may be wrong, and are ignored.
    while (at + 8 < this.end) {
      const bytes = load<u64>(at);
      const quotes = bytes ^ 0x2222222222222222;
      const backslashes = bytes ^ 0x5c5c5c5c5c5c5c5c;
      const controls = (bytes - 0x2020202020202020) & ~bytes;
      const found =
        controls | ((quotes - 0x0101010101010101) & ~quotes) | ((backslashes - 0x0101010101010101) & ~backslashes);
      const mask = found & 0x8080808080808080;
      if (mask) {
        at += <usize>(ctz(mask) >> 3);
        break;
      }
      at += 8;
    }
    this.at = at;
  }

  private escape(): void {
    const kind = this.peek();
    this.at++;
    switch (kind) {
      case QUOTE:
      case BACKSLASH:
      case 0x2f:
      case 0x62:
      case 0x66:
      case 0x6e:
      case 0x72:
      case 0x74:
        return;
      case 0x75:
        for (let digits = 0; digits < 4; digits++) {
          if (hex(this.peek()) < 0) invalid();
          this.at++;
        }
        return;
      default:
        invalid();
    }
  }

  private name(): void {
    this.skipSpace();
    this.string();
    this.skipSpace();
    if (!this.take(COLON)) invalid();
  }

  private scalar(): void {
    switch (this.peek()) {
      case 0x74:
        return this.word("true");
      case 0x66:
        return this.word("false");
      case 0x6e:
        return this.word("null");
    }
    this.take(MINUS);
    if (!this.take(0x30)) this.digits();
    if (this.take(POINT)) this.digits();
    if (this.take(0x65) || this.take(0x45)) {
      if (!this.take(PLUS)) this.take(MINUS);
      this.digits();
    }
  }

  private word(word: string): void {
    for (let at = 0; at < word.length; at++) {
      if (!this.take(<u8>word.charCodeAt(at))) invalid();
    }
  }

  private digits(): void {
    const start = this.at;
    while (isDigit(this.peek())) this.at++;
    if (this.at == start) invalid();
  }
}

function invalid(): void {
  throw new Error("the event is not valid JSON");
}

function isDigit(byte: u8): bool {
  return byte >= 0x30 && byte <= 0x39;
}

function lower(code: u32): u32 {
  return code >= 0x41 && code <= 0x5a ? code | 0x20 : code;
}

function hex(code: u32): i32 {
  if (code >= 0x30 && code <= 0x39) return code - 0x30;
  code |= 0x20;
  return code >= 0x61 && code <= 0x66 ? code - 0x61 + 10 : -1;
}

/** Returns the position of `byte`, or `end` if it does not occur. */
function find(byte: u8, start: usize, end: usize): usize {
  while (start < end && load<u8>(start) != byte) start++;
  return start;
}

function unescape(start: usize, end: usize): string {
  if (find(BACKSLASH, start, end) == end) return String.UTF8.decodeUnsafe(start, end - start);
  const bytes = unescapeBytes(start, end);
  return String.UTF8.decodeUnsafe(bytes.dataStart, bytes.length);
}

/** Decodes the content of a string into UTF-8. An unpaired surrogate becomes U+FFFD. */
function unescapeBytes(start: usize, end: usize): Uint8Array {
  // An escape is longer than the character that it encodes.
  const bytes = new Uint8Array(<i32>(end - start));
  const plain = find(BACKSLASH, start, end) - start;
  memory.copy(bytes.dataStart, start, plain);
  let from = start + plain;
  if (from == end) return bytes;
  let to = bytes.dataStart + plain;
  while (from < end) {
    const byte = load<u8>(from++);
    if (byte != BACKSLASH) {
      store<u8>(to++, byte);
      continue;
    }
    const kind = load<u8>(from++);
    if (kind != 0x75) {
      store<u8>(to++, control(kind));
      continue;
    }
    const unit = unitAt(from);
    from += 4;
    if (unit < 0x80) {
      store<u8>(to++, unit);
    } else if (unit < 0x800) {
      store<u8>(to, 0xc0 | (unit >> 6));
      store<u8>(to, 0x80 | (unit & 0x3f), 1);
      to += 2;
    } else if (isHigh(unit) && isEscapedUnit(from, end) && isLow(unitAt(from + 2))) {
      to = putPair(to, unit, unitAt(from + 2));
      from += 6;
    } else {
      to = putThree(to, isHigh(unit) || isLow(unit) ? 0xfffd : unit);
    }
  }
  return bytes.subarray(0, <i32>(to - bytes.dataStart));
}

/** Returns the character that the letter of an escape encodes. */
function control(kind: u8): u8 {
  switch (kind) {
    case 0x62:
      return 0x08;
    case 0x66:
      return 0x0c;
    case 0x6e:
      return 0x0a;
    case 0x72:
      return 0x0d;
    case 0x74:
      return 0x09;
    default:
      return kind;
  }
}

/** Whether an escape like `\u0000` follows. In a validated document it is complete. */
function isEscapedUnit(at: usize, end: usize): bool {
  return at + 6 <= end && load<u8>(at) == BACKSLASH && load<u8>(at, 1) == 0x75;
}

/** Reads a UTF-16 unit from four hexadecimal digits. */
function unitAt(at: usize): u32 {
  let unit: u32 = 0;
  for (let digit: usize = 0; digit < 4; digit++) unit = (unit << 4) | hex(load<u8>(at + digit));
  return unit;
}

/** Returns `text` as a JSON string. */
export function quote(text: string): string {
  const out = new Writer();
  out.quoted(text);
  return out.takeString();
}
