/**
 * Events on disk while the broker is away: appended, checksummed, bounded, read back in order. The files and the lock are
 * those of the Python SDK (`ratchet_sdk/spool.py`), and either sends what the other left.
 *
 * A directory of segments, for one process at a time: a second process of the same agent takes the one beside it, and a
 * later one whichever is free and holds something. A record is a mark, then two big-endian 32-bit numbers, the length and
 * the CRC-32 of what follows; then one byte of flags, the message id, a zero byte, and the event as it would be sent.
 * `position` says up to where everything is acknowledged; it may lie behind, since an event that is sent twice is stored
 * once. What is not whole is left out up to the next whole record.
 */

import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, open, readdir, readFile, rename, rm, truncate, writeFile, type FileHandle } from "node:fs/promises";
import { join } from "node:path";

export const TRIED = 1; // flags: it was sent before and may be stored
export const PACKED = 2; // it is zipped

const MARK = Buffer.from([0xff, 0x52, 0x58, 0x01]); // its first byte occurs in no UTF-8: no event's text looks like a record
const HEAD_BYTES = MARK.length + 8;
const PLACES = 8; // for processes of one agent at the same time
const SEGMENT = /^\d+\.events$/;

/** An event as it is sent. */
export interface Packed {
  id: string;
  data: Uint8Array;
  flags: number;
}

/** One that waits on disk, in a record of `sizeBytes` that ends at `place`. */
export interface Spooled extends Packed {
  place: Place;
  sizeBytes: number;
}

interface Place {
  segment: number;
  offset: number;
}

/** One call at a time. Each may throw what the disk says. `directory` is known once it is open. */
export class Spool {
  /** Events that are not acknowledged. */
  pending = 0;
  /** Bytes that were left out because their checksum does not fit. */
  damaged = 0;
  readonly #bytes = new Map<number, number>(); // of each segment, the oldest first
  #lock: FileHandle | undefined;
  #tail: FileHandle | undefined;
  #begin: Place = { segment: 0, offset: 0 };

  constructor(
    public directory: string,
    readonly maxBytes = 256 * 1024 * 1024,
    readonly segmentBytes = 8 * 1024 * 1024,
  ) {}

  /** Take the directory and look what it holds. Throws where other processes write to it and to all beside it. */
  async open(): Promise<void> {
    await this.#take();
    const found = (await segmentsIn(this.directory)).map((name) => parseInt(name, 10)).sort((a, b) => a - b);
    this.#begin = await this.#readPosition(found[0] ?? 0);
    for (const segment of found) {
      if (segment < this.#begin.segment) await rm(this.#path(segment));
      else await this.#look(segment);
    }
  }

  async close(): Promise<void> {
    const files = [this.#tail, this.#lock];
    this.#tail = this.#lock = undefined;
    for (const file of files) await file?.close();
  }

  /** Keep events in order, on disk when this is done. Gives how many there was room for; if the disk refuses, none is. */
  async append(events: readonly Packed[]): Promise<number> {
    const before = new Map(this.#bytes);
    let room = this.maxBytes - [...before.values()].reduce((sum, bytes) => sum + bytes, 0);
    let kept = 0;
    try {
      for (const event of events) {
        const record = recordOf(event);
        room -= record.length;
        if (room < 0) break;
        await this.#write(record);
        kept += 1;
      }
      await this.#tail?.sync();
    } catch (error) {
      await this.#undo(before);
      throw error;
    }
    this.pending += kept;
    return kept;
  }

  /** The oldest that are not done with, up to so many events or bytes, one at the least where there is one. */
  async read(events: number, sizeBytes: number): Promise<Spooled[]> {
    const found: Spooled[] = [];
    let readBytes = 0;
    for (const segment of this.#bytes.keys()) {
      for (const record of recordsIn(await this.#dataOf(segment), this.#beginOf(segment))) {
        readBytes += record.data.length;
        if (found.length === events || (found.length > 0 && readBytes > sizeBytes)) return found;
        found.push(record);
      }
    }
    return found;
  }

  /** The `events` oldest, up to `last`, are done with for good. A full disk is no error here. */
  async done(last: Spooled, events: number): Promise<void> {
    this.#begin = last.place;
    this.pending -= events;
    if (this.pending === 0) await this.#closeTail();
    for (const segment of this.#bytes.keys()) {
      if (segment < last.place.segment || this.pending === 0) {
        await rm(this.#path(segment), { force: true });
        this.#bytes.delete(segment);
      }
    }
    const temporary = join(this.directory, "position.new");
    await writeFile(temporary, `${this.#begin.segment} ${this.#begin.offset}\n`)
      .then(() => rename(temporary, join(this.directory, "position")))
      .catch(() => undefined); // it lies behind then, and what is sent twice is stored once
  }

  /** The files are gone: nothing is pending, and the next event begins a new one. */
  async forget(): Promise<void> {
    await this.#closeTail();
    this.#bytes.clear();
    this.pending = 0;
  }

  /** The first place that is free, before others one with events in it. */
  async #take(): Promise<void> {
    const first = this.directory;
    const places = [...Array(PLACES).keys()].map((n) => (n === 0 ? first : `${first}.${n}`));
    const holding = await Promise.all(places.map((place) => segmentsIn(place).then((found) => found.length > 0)));
    const [full, empty] = [true, false].map((holds) => places.filter((_, n) => holding[n] === holds));
    for (const place of [...full!, ...empty!]) {
      await mkdir(place, { recursive: true, mode: 0o700 });
      this.#lock = await locked(join(place, "lock"));
      this.directory = place;
      if (this.#lock !== undefined) return;
    }
    throw new Error(`${first} and the ${PLACES - 1} beside it are in use by other processes`);
  }

  async #look(segment: number): Promise<void> {
    const data = await this.#dataOf(segment);
    const begin = this.#beginOf(segment);
    let end = begin.offset;
    for (const record of recordsIn(data, begin)) {
      this.pending += 1;
      this.damaged += record.place.offset - record.sizeBytes - end;
      end = record.place.offset;
    }
    if (end < data.length) {
      this.damaged += data.length - end;
      await truncate(this.#path(segment), end);
    }
    this.#bytes.set(segment, Math.min(end, data.length));
  }

  async #write(record: Uint8Array): Promise<void> {
    let last = Math.max(this.#begin.segment, ...this.#bytes.keys());
    if (this.#tail === undefined || this.#bytes.get(last)! + record.length > this.segmentBytes) {
      await this.#tail?.sync();
      await this.#closeTail();
      last += 1; // never into an old segment, whose end may be torn
      this.#tail = await open(this.#path(last), "wx");
      this.#bytes.set(last, 0);
    }
    await this.#tail.appendFile(record);
    this.#bytes.set(last, this.#bytes.get(last)! + record.length);
  }

  async #undo(before: Map<number, number>): Promise<void> {
    await this.#closeTail().catch(() => undefined);
    for (const segment of this.#bytes.keys()) {
      if (before.has(segment)) continue;
      await rm(this.#path(segment), { force: true });
      this.#bytes.delete(segment);
    }
    for (const [segment, sizeBytes] of before) {
      await truncate(this.#path(segment), sizeBytes);
      this.#bytes.set(segment, sizeBytes);
    }
  }

  async #closeTail(): Promise<void> {
    const tail = this.#tail;
    this.#tail = undefined;
    await tail?.close();
  }

  async #readPosition(oldest: number): Promise<Place> {
    const text = await readFile(join(this.directory, "position"), "utf8").catch(() => "");
    const [, segment, offset] = text.match(/^(\d+) (\d+)\n/) ?? [];
    // Never written, or cut off by a crash: everything that is there is sent again.
    return offset === undefined ? { segment: oldest, offset: 0 } : { segment: Number(segment), offset: Number(offset) };
  }

  /** What is in a segment; nothing where somebody took it away. */
  async #dataOf(segment: number): Promise<Buffer> {
    return readFile(this.#path(segment)).catch((error: NodeJS.ErrnoException) => {
      if (error.code === "ENOENT") return Buffer.alloc(0);
      throw error;
    });
  }

  #beginOf(segment: number): Place {
    return segment === this.#begin.segment ? this.#begin : { segment, offset: 0 };
  }

  #path(segment: number): string {
    return join(this.directory, `${String(segment).padStart(12, "0")}.events`);
  }
}

async function segmentsIn(directory: string): Promise<string[]> {
  const names = await readdir(directory).catch((): string[] => []);
  return names.filter((name) => SEGMENT.test(name));
}

/**
 * The file, locked until it is closed or the process ends; nothing where another process has the lock. Node has no call for
 * it, but a lock belongs to the open file: flock(1) takes it on ours, and leaves it to us as it ends.
 */
async function locked(path: string): Promise<FileHandle | undefined> {
  const file = await open(path, "w");
  try {
    const [code] = await once(spawn("flock", ["-n", "3"], { stdio: ["ignore", "ignore", "ignore", file.fd] }), "exit");
    if (code === 0) return file;
    if (code !== 1) throw new Error(`flock(1) ended with ${code}`);
  } catch (error) {
    await file.close();
    throw new Error(`${path} cannot be locked, for which flock(1) must be installed`, { cause: error });
  }
  await file.close();
  return undefined;
}

function recordOf({ id, data, flags }: Packed): Buffer {
  const payload = Buffer.concat([Buffer.from([flags]), Buffer.from(`${id}\0`), data]);
  const head = Buffer.alloc(HEAD_BYTES);
  MARK.copy(head);
  head.writeUInt32BE(payload.length, MARK.length);
  head.writeUInt32BE(crc32(payload), MARK.length + 4);
  return Buffer.concat([head, payload]);
}

/** The records of a segment that are whole, from `begin` to its end. */
function* recordsIn(data: Buffer, { segment, offset }: Place): Generator<Spooled> {
  while (offset >= 0 && offset < data.length) {
    const payload = payloadAt(data, offset);
    if (payload === undefined) {
      offset = data.indexOf(MARK, offset + 1);
      continue;
    }
    const sizeBytes = HEAD_BYTES + payload.length;
    const zero = payload.indexOf(0, 1);
    offset += sizeBytes;
    yield {
      id: payload.toString("utf8", 1, zero),
      data: payload.subarray(zero + 1),
      flags: payload[0]!,
      place: { segment, offset },
      sizeBytes,
    };
  }
}

/** What the record that begins here holds; nothing where none does. */
function payloadAt(data: Buffer, offset: number): Buffer | undefined {
  const begin = offset + HEAD_BYTES;
  if (begin > data.length || data.compare(MARK, 0, MARK.length, offset, offset + MARK.length) !== 0) return undefined;
  const length = data.readUInt32BE(offset + MARK.length);
  if (length === 0 || begin + length > data.length) return undefined;
  const payload = data.subarray(begin, begin + length);
  return crc32(payload) === data.readUInt32BE(offset + MARK.length + 4) ? payload : undefined;
}

const CRC_OF_BYTE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

/** As zlib's, which node has since 20.15. */
function crc32(data: Uint8Array): number {
  let crc = ~0;
  for (const byte of data) crc = (crc >>> 8) ^ CRC_OF_BYTE[(crc ^ byte) & 0xff]!;
  return ~crc >>> 0;
}
