// Unpacks the data blocks that page_data.py packs, each when it is first needed.
const blocks = (() => {
const index = JSON.parse(document.getElementById("index").textContent);
const unpacked = new Map(); // name of a block -> promise of its fields
const waiting = new Map(); // name of a block -> function that takes its text

// Blocks of a large page are scripts in a folder beside it; each calls `add`.
function readText(name) {
  if (!index.folder) return document.getElementById("block-" + name).textContent;
  return new Promise((resolve, reject) => {
    waiting.set(name, resolve);
    const script = document.createElement("script");
    script.src = `${index.folder}/${name}.js`;
    script.onload = () => script.remove();
    script.onerror = () => {
      unpacked.delete(name);
      const why = `The folder ${index.folder} is missing beside this page. If the command was run again since, reload the page.`;
      document.querySelector(".browser .unit").textContent = why;
      reject(new Error(why));
    };
    document.head.append(script);
  });
}

function add(name, text) {
  waiting.get(name)(text);
  waiting.delete(name);
}

// Unpacks a block: name of a field -> { values, of(row) }. Rows are units or, in the block of the text, sequences.
// A field has the lowest byte of every number, then the next byte of every number, ...
async function unpack(name, layout, rows) {
  const ARRAYS = { u1: Uint8Array, i1: Int8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
  const text = atob(await readText(name)), packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const fields = {};
  let at = 0;
  for (const [field, type, width] of layout) {
    const size = ARRAYS[type].BYTES_PER_ELEMENT, count = rows * width;
    const numbers = new Uint8Array(count * size);
    for (let byte = 0; byte < size; byte++) {
      for (let i = 0; i < count; i++) numbers[i * size + byte] = bytes[at++];
    }
    const values = new ARRAYS[type](numbers.buffer);
    fields[field] = { values, of: row => values.subarray(row * width, (row + 1) * width) };
  }
  return fields;
}

function unpackOnce(name, layout, rows) {
  if (!unpacked.has(name)) unpacked.set(name, unpack(name, layout, rows));
  return unpacked.get(name);
}

const findBlock = unit => Math.floor(unit / index.units_per_block);
const unpackPart = (kind, name, layout, block) =>
  unpackOnce(`${name}-${block}`, layout, Math.min(index.units_per_block, kind.units - block * index.units_per_block));

// Loads the fields that the list shows: those it sorts by, of all units, and the tokens of `units`.
async function loadFields(kind, units = []) {
  const fields = await unpackOnce(kind.kind, kind.list_layout, kind.units);
  if (!fields.tokenBlocks) {
    const tokenBlocks = fields.tokenBlocks = []; // the fields of each unpacked block
    for (const [field] of kind.token_layout) {
      fields[field] = { of: unit => tokenBlocks[findBlock(unit)][field].of(unit % index.units_per_block) };
    }
  }
  await Promise.all([...new Set([...units].map(findBlock))].map(async block => {
    fields.tokenBlocks[block] = await unpackPart(kind, `${kind.kind}-tokens`, kind.token_layout, block);
  }));
  return fields;
}

// Loads the details of a unit: name of a field -> its values.
async function loadDetails(kind, unit) {
  const fields = await unpackPart(kind, kind.kind, kind.detail_layout, findBlock(unit));
  const row = unit % index.units_per_block;
  return Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.of(row)]));
}

const loadText = () => unpackOnce("text", index.text_layout, index.sequences);

return { index, add, loadFields, loadDetails, loadText };
})();
