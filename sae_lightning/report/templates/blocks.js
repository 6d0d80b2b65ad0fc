// Unpacks the data blocks that page_data.py packs, each when it is first needed.
const blocks = (() => {
const index = JSON.parse(document.getElementById("index").textContent);
const unpacked = new Map(), waiting = new Map();

// Blocks of a large page are scripts in a folder beside it; each calls `add`.
function textOf(name) {
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

async function unpack(name, layout, units) {
  const ARRAYS = { u1: Uint8Array, i1: Int8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
  const text = atob(await textOf(name)), packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const fields = {};
  let at = 0;
  for (const [field, type, width] of layout) {
    const size = ARRAYS[type].BYTES_PER_ELEMENT, count = units * width;
    const numbers = new Uint8Array(count * size);
    for (let byte = 0; byte < size; byte++) {
      for (let i = 0; i < count; i++) numbers[i * size + byte] = bytes[at++];
    }
    const values = new ARRAYS[type](numbers.buffer);
    fields[field] = { values, of: row => values.subarray(row * width, (row + 1) * width) };
  }
  return fields;
}

function unpackOnce(name, layout, units) {
  if (!unpacked.has(name)) unpacked.set(name, unpack(name, layout, units));
  return unpacked.get(name);
}

const blockOf = unit => Math.floor(unit / index.chunk);
const part = (kind, name, layout, block) =>
  unpackOnce(`${name}-${block}`, layout, Math.min(index.chunk, kind.units - block * index.chunk));

// What all units are sorted by, and the words of `units`.
async function listedOf(kind, units = []) {
  const listed = await unpackOnce(kind.kind, kind.listed, kind.units);
  if (!listed.words) {
    const words = listed.words = []; // by block
    for (const [field] of kind.words) {
      listed[field] = { of: unit => words[blockOf(unit)][field].of(unit % index.chunk) };
    }
  }
  await Promise.all([...new Set([...units].map(blockOf))].map(async block => {
    listed.words[block] = await part(kind, `${kind.kind}-words`, kind.words, block);
  }));
  return listed;
}

async function detailsOf(kind, unit) {
  const fields = await part(kind, kind.kind, kind.detailed, blockOf(unit)), row = unit % index.chunk;
  return Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.of(row)]));
}

const texts = () => unpackOnce("texts", index.texts, index.sequences);

return { index, add, listedOf, detailsOf, texts };
})();
