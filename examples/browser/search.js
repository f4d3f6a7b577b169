// Words to a unit vector by the model's text graph, then the pictures whose vectors are nearest. n pictures, P width.
import * as ort from "./onnxruntime-web/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./tokenizers/tokenizers.min.mjs";

const COUNT = 12;

async function read(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: the server says ${answer.status}`);
  return answer;
}
const json = async (name) => (await read(name)).json();
const bytes = async (name) => (await read(name)).arrayBuffer();

// what the folder holds, side by side; pages of other sites may not use threads
ort.env.wasm.numThreads = 1;
const [site, tokens, tokenNames, halves, session] = await Promise.all([
  json("site.json"),
  json("tokenizer.json"),
  json("tokenizer_config.json"),
  bytes("vectors.f16"),
  bytes("text_int8.onnx").then((graph) => ort.InferenceSession.create(graph)),
]);
const vectors = Float32Array.from(new Float16Array(halves)); // (n * P)
// without added tokens, so that a text which spells one is letters, as oner's processor reads it
const tokenizer = new Tokenizer({ ...tokens, added_tokens: [] }, tokenNames);

// The ids of a text: [CLS], then the words, cut to the model's longest text.
export function idsOf(text) {
  const { ids } = tokenizer.encode(text, { add_special_tokens: false });
  return [site.first, ...ids.slice(0, site.longest)];
}

// The unit vector (P) of token ids.
export async function embed(ids) {
  const shape = [1, ids.length];
  const { vectors } = await session.run({
    input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
  });
  return vectors.data;
}

export function vectorOf(row) {
  return vectors.subarray(row * site.width, (row + 1) * site.width);
}

// The k rows nearest to a unit vector (P), best first, each with its cosine; of equal ones the first.
export function nearest(query, k = COUNT) {
  const scores = new Float32Array(site.items.length);
  for (let row = 0; row < scores.length; row++) {
    let sum = 0;
    for (let at = 0; at < site.width; at++) sum += vectors[row * site.width + at] * query[at];
    scores[row] = sum;
  }
  const order = [...scores.keys()].sort((one, other) => scores[other] - scores[one] || one - other);
  return order.slice(0, k).map((row) => ({ row, score: scores[row] }));
}

// From here on the page

const remark = document.querySelector("#remark");
const words = document.querySelector("#words");
const button = document.querySelector("button");

function show(query, asked) {
  const start = performance.now();
  const found = nearest(query);
  const figures = found.map(({ row, score }) => {
    const { caption, file } = site.items[row];
    const figure = document.createElement("figure");
    if (file) figure.append(Object.assign(new Image(), { src: file, alt: caption }));
    figure.append(Object.assign(document.createElement("figcaption"), { textContent: `${score.toFixed(3)} ${caption}` }));
    figure.onclick = () => show(vectorOf(row), `“${caption}”`);
    return figure;
  });
  document.querySelector("#answers").replaceChildren(...figures);
  remark.textContent = `The ${found.length} nearest of ${site.items.length} to ${asked}`;
  return performance.now() - start;
}

async function ask(event) {
  event?.preventDefault();
  const text = words.value.trim();
  if (!text) {
    remark.textContent = "Type some words.";
    return;
  }
  const start = performance.now();
  const ids = idsOf(text);
  const query = await embed(ids);
  const read = performance.now() - start;
  const searched = show(query, `“${text}”`);

  // words that the vocabulary lacks say nothing, and how long both took
  const lost = ids.filter((id) => id === site.unknown).length;
  remark.textContent += `: ${read.toFixed(0)} ms to read the words, ${searched.toFixed(0)} ms to search.`;
  if (lost) remark.textContent += ` ${lost} of ${ids.length - 1} tokens are unknown to the model.`;
}

document.querySelector("form").onsubmit = ask;
button.disabled = false;
remark.textContent = `${site.items.length} pictures.`;
