// Arrays of integers as NumPy saves them (.npy, version 1 to 3), in base64.

const READERS = {
  "|u1": [1, "getUint8"], "|i1": [1, "getInt8"], "<i2": [2, "getInt16"], "<u2": [2, "getUint16"], "<i4": [4, "getInt32"],
  "<u4": [4, "getUint32"],
};

// Returns {shape, values: Int32Array}, in C order. Raises an Error for anything else.
export function readNpy(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  if (bytes.length < 10 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY") throw new Error("not an .npy array");
  const [start, length] = bytes[6] === 1 ? [10, view.getUint16(8, true)] : [12, view.getUint32(8, true)];
  const header = new TextDecoder().decode(bytes.subarray(start, start + length));
  const type = header.match(/'descr': '([^']+)'/)?.[1];
  const isFortran = /'fortran_order': True/.test(header);
  const shape = header.match(/'shape': \(([\d, ]*)\)/)?.[1].split(",").filter((part) => part.trim()).map(Number);
  const [size, read] = READERS[type] ?? [];
  if (!size || !shape || isFortran) throw new Error(`an .npy array of ${type}`);
  const count = shape.reduce((product, part) => product * part, 1);
  if (bytes.length < start + length + count * size) throw new Error("an .npy array that ends early");
  return { shape, values: Int32Array.from({ length: count }, (_, index) => view[read](start + length + index * size, true)) };
}
