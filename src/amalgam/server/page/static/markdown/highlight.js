// Code → pieces that are shown in colours. What a language looks like stands in a few lines below; its grammar is not
// followed. Every character is looked at once, whatever stands there.

const C_WORDS = `
  break case catch class const continue default do else enum export extends extern finally for if implements import in
  interface namespace new null private protected public return static struct super switch this throw true false try
  typedef typeof union using void volatile while yield async await abstract final package virtual override template
  typename operator sizeof auto let var function of instanceof delete`;
const TYPES = `
  int long short char float double bool boolean byte unsigned signed size_t string any never unknown number`;
const SH_WORDS = `
  if then else elif fi for while until do done case esac in function return exit export local readonly set unset
  source alias cd echo sudo`;
const SQL_WORDS = `
  select from where insert into values update set delete create table drop alter add primary key foreign references
  index view join left right inner outer full cross on using group by order having limit offset union all distinct as
  and or not null is in between like exists case when then else end asc desc with begin commit rollback default unique
  check cascade`;

const SLASHES = { line: ["//"], block: ["/*", "*/"], quotes: "\"'`" };
const HASH = { line: ["#"], quotes: "\"'" };
const FAMILIES = [
  [["c", "h", "cpp", "c++", "cc", "hpp", "cuda", "java", "cs", "csharp", "c#", "dart", "php", "scala", "groovy"], { ...SLASHES, words: `
    ${C_WORDS} ${TYPES}` }],
  [["js", "javascript", "jsx", "mjs", "ts", "typescript", "tsx"], { ...SLASHES, words: `
    ${C_WORDS} ${TYPES} undefined from as type keyof readonly debugger` }],
  [["go", "golang"], { ...SLASHES, words: `
    ${TYPES} break case chan const continue default defer else error fallthrough for func go goto if import interface
    map nil package range return select struct switch true false type var` }],
  [["rust", "rs"], { ...SLASHES, quotes: "\"", words: `
    as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut
    pub ref return self Self static struct super trait true type unsafe use where while i8 i16 i32 i64 u8 u16 u32 u64
    usize isize f32 f64 bool char str String` }],
  [["swift", "kotlin", "kt"], { ...SLASHES, quotes: "\"", words: `
    ${C_WORDS} fun func val guard init nil self protocol extension where when object data companion` }],
  [["css", "scss", "less"], { line: [], block: ["/*", "*/"], quotes: "\"'", words: "" }],
  [["python", "py", "python3", "ipython", "pycon"], { ...HASH, long: ["\"\"\"", "'''"], words: `
    and as assert async await break case class continue def del elif else except False finally for from global if
    import in is lambda match None nonlocal not or pass raise return True try while with yield self` }],
  [["bash", "sh", "shell", "zsh", "console", "dockerfile", "docker", "makefile", "make"], { ...HASH, words: `
    ${SH_WORDS} FROM RUN COPY ADD ENV ARG WORKDIR ENTRYPOINT CMD EXPOSE` }],
  [["yaml", "yml", "toml", "ini", "conf", "properties"], { ...HASH, words: `
    true false null yes no on off`, hasKeys: true }],
  [["ruby", "rb", "perl", "r", "julia", "jl", "elixir"], { ...HASH, words: `
    begin break case class def do else elsif end ensure false for function if in module my new next nil not or and
    require rescue return self sub then true TRUE FALSE NULL undef unless until use using when while yield` }],
  [["sql", "postgresql", "mysql", "sqlite"], { line: ["--"], block: ["/*", "*/"], quotes: "'\"", words: SQL_WORDS, ignoresCase: true }],
  [["lua", "haskell", "hs"], { line: ["--"], quotes: "\"'", words: `
    and break case class data deriving do else elseif end false for function goto if import in instance let local
    module newtype nil not of or repeat return then true type until where while` }],
  [["json", "jsonc", "json5", "jsonl"], { ...SLASHES, quotes: "\"", words: "true false null", hasKeys: true }],
];
const LANGUAGES = new Map();
for (const [names, { words, ...family }] of FAMILIES) {
  const language = { line: [], long: [], ...family, words: new Set(words.trim().split(/\s+/)) };
  for (const name of names) LANGUAGES.set(name, language);
}

const MAX_LENGTH = 50_000; // what is longer stays in one colour
const WORD = /[\p{L}_$][\p{L}\p{N}_$]*/uy;
const NUMBER = /0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d[\d_]*)?(?:[eE][+-]?\d+)?/y;
const KEY = /[ \t]*:(?=\s|$)/y;
const CALL = /\s{0,2}\(/y;

// Returns [kind, text] pieces that make up the text: comment, string, number, keyword, call, key, added, removed; "".
export function highlight(text, name) {
  const language = LANGUAGES.get(name.toLowerCase());
  if (text.length > MAX_LENGTH) return [["", text]];
  if (["diff", "patch"].includes(name.toLowerCase())) return byLine(text);
  return language ? scan(text, language) : [["", text]];
}

function byLine(text) {
  return text.split(/(?<=\n)/).map((line) => [line.startsWith("+") ? "added" : line.startsWith("-") ? "removed" : "", line]);
}

function scan(text, language) {
  const pieces = [];
  let plain = 0; // where what has no kind begins
  let at = 0;
  while (at < text.length) {
    const [kind, end] = next(text, at, language);
    if (kind) {
      if (plain < at) pieces.push(["", text.slice(plain, at)]);
      pieces.push([kind, text.slice(at, end)]);
      plain = end;
    }
    at = end;
  }
  if (plain < text.length) pieces.push(["", text.slice(plain)]);
  return pieces;
}

// The kind of what begins at a place, and where it ends.
function next(text, at, language) {
  const { line, block, long, quotes } = language;
  if (line.some((mark) => text.startsWith(mark, at)) && startsComment(text, at)) return ["comment", endOf(text, "\n", at)];
  if (block && text.startsWith(block[0], at)) return ["comment", endOf(text, block[1], at + 2, true)];
  const mark = long.find((one) => text.startsWith(one, at));
  if (mark) return ["string", endOf(text, mark, at + 3, true)];
  if (quotes.includes(text[at])) {
    const end = endOfString(text, at);
    return [language.hasKeys && matchAt(KEY, text, end) ? "key" : "string", end];
  }
  const word = matchAt(WORD, text, at);
  if (word) return [kindOfWord(word, text, at + word.length, language), at + word.length];
  const number = matchAt(NUMBER, text, at);
  return number ? ["number", at + number.length] : ["", at + 1];
}

function kindOfWord(word, text, end, language) {
  if (language.hasKeys && matchAt(KEY, text, end)) return "key";
  if (language.words.has(language.ignoresCase ? word.toLowerCase() : word)) return "keyword";
  return matchAt(CALL, text, end) ? "call" : "";
}

// A # within a word, as in ${#name} or a URL, begins no comment.
const startsComment = (text, at) => text[at] !== "#" || at === 0 || /\s/.test(text[at - 1]);

function endOf(text, mark, from, isIncluded = false) {
  const found = text.indexOf(mark, from);
  return found < 0 ? text.length : found + (isIncluded ? mark.length : 0);
}

// Of a string that is not closed: the end of its line, or of all where it may have several.
function endOfString(text, at) {
  const quote = text[at];
  for (let end = at + 1; end < text.length; end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === quote) return end + 1;
    else if (text[end] === "\n" && quote !== "`") return end;
  }
  return text.length;
}

function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text)?.[0];
}
