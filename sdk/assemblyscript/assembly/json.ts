/**
 * Reads JSON where it lies in memory. A document is checked once; after that its values are slices of it, and a text
 * becomes a string only when it is asked for.
 */

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

/** Deeper than any event; the containers that are open are kept in a list, not on the stack. */
const MAX_DEPTH: i32 = 1024;
const openContainers = new StaticArray<u8>(MAX_DEPTH);

/** A value of a document. One that is missing has no bytes. */
export class Value {
  constructor(
    readonly start: usize,
    readonly end: usize,
  ) {}

  /** The one object of a document; ends the call when the document is something else. */
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

  /** The text; empty when the value is no text. */
  get text(): string {
    return this.isText ? unescape(this.start + 1, this.end - 1) : "";
  }

  /** Whether the value is true. */
  get flag(): bool {
    return this.first == 0x74;
  }

  /** The value as a whole number; `otherwise` when it is none, is negative or does not fit. */
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

  /** The member with this name; the last one when there are several. */
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

/** Steps through the members of an object, or the elements of an array. */
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
    // Nothing is in a value that is no container.
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

  /** Compares without making a string of the name, unless it holds an escape. */
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

  /** The next value with all that it holds. It does not recurse, for the stack is small. */
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

  /** Steps into containers up to the first value that holds none, and over that one. */
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
      // In ASCII, a closing bracket or brace comes two after the opening one.
      const close = first + 2;
      this.at++;
      this.skipSpace();
      if (this.take(close)) return depth;
      if (depth == MAX_DEPTH) throw new Error("the event is nested deeper than 1024 levels");
      openContainers[depth++] = close;
      if (close == CLOSE_OBJECT) this.name();
    }
  }

  /** Steps out of the containers that end here, up to one that goes on. */
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
      const byte = load<u8>(this.at++);
      if (byte == QUOTE) return;
      if (byte < 0x20) invalid();
      if (byte == BACKSLASH) this.escape();
    }
    invalid();
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

function unescape(start: usize, end: usize): string {
  const raw = String.UTF8.decodeUnsafe(start, end - start);
  const first = raw.indexOf("\\");
  if (first < 0) return raw;
  const units: i32[] = [];
  let at = first;
  while (at < raw.length) {
    const code = raw.charCodeAt(at++);
    if (code != BACKSLASH) {
      units.push(code);
      continue;
    }
    const kind = raw.charCodeAt(at++);
    switch (kind) {
      case 0x62:
        units.push(0x08);
        break;
      case 0x66:
        units.push(0x0c);
        break;
      case 0x6e:
        units.push(0x0a);
        break;
      case 0x72:
        units.push(0x0d);
        break;
      case 0x74:
        units.push(0x09);
        break;
      case 0x75: {
        let unit = 0;
        for (let digit = 0; digit < 4; digit++) unit = (unit << 4) | hex(raw.charCodeAt(at++));
        units.push(unit);
        break;
      }
      default:
        units.push(kind);
    }
  }
  return raw.substring(0, first) + String.fromCharCodes(units);
}

/** `text` as a JSON string. */
export function quote(text: string): string {
  let out = '"';
  let start = 0;
  for (let at = 0; at < text.length; at++) {
    const code = text.charCodeAt(at);
    if (code >= 0x20 && code != QUOTE && code != BACKSLASH) continue;
    out += text.substring(start, at);
    start = at + 1;
    if (code == QUOTE) out += '\\"';
    else if (code == BACKSLASH) out += "\\\\";
    else out += "\\u00" + (code < 0x10 ? "0" : "") + code.toString(16);
  }
  return out + text.substring(start) + '"';
}
