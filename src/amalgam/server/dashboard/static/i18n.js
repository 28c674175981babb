// The page's words in English and Chinese. Names that come from models and clients are never translated.

const KEY = "amalgam.language";
const listeners = [];
let current = "en";

const WORDS = {
  title: ["amalgam dashboard", "amalgam 面板"],
  nav_serving: ["Serving", "服务"],
  nav_usage: ["Experts", "专家"],
  nav_precision: ["Precision", "精度"],
  nav_inspector: ["Tokens", "词元"],
  nav_analysis: ["Concentration", "集中度"],
  nav_memory: ["Memory", "内存"],
  nav_playground: ["Playground", "试用"],
  to_theme: ["Switch between light and dark", "切换明暗主题"],
  to_language: ["中文", "English"],
  docs: ["API", "接口"],

  status_connecting: ["connecting", "连接中"],
  status_healthy: ["healthy", "运行正常"],
  status_loading: ["loading", "加载中"],
  status_draining: ["draining", "正在排空"],
  status_failed: ["failed", "已失败"],
  status_disconnected: ["no connection", "连接中断"],
  weight_version: ["weights v{0}", "权重 v{0}"],
  uptime: ["up {0}", "已运行 {0}"],

  loading: ["Loading…", "加载中…"],
  no_data: ["Nothing counted yet. Send a request, or use the playground below.", "尚无统计。请发送请求，或使用下方的试用区。"],
  no_experts: ["This model has no experts.", "此模型没有专家。"],
  no_statistics: ["The use of experts is not counted here: statistics.enabled is off.", "此处不统计专家的使用：statistics.enabled 未开启。"],
  retry: ["Retry", "重试"],
  all: ["all", "全部"],
  none: ["none", "无"],
  layer: ["Layer", "层"],
  layer_n: ["Layer {0}", "第 {0} 层"],
  expert: ["Expert", "专家"],
  expert_n: ["Expert {0}", "专家 {0}"],
  cell_name: ["Layer {0} · Expert {1}", "第 {0} 层 · 专家 {1}"],
  share: ["of its layer", "占本层"],
  share_of_layer: ["Share of its layer", "占本层"],
  of_even: ["{0} the even share", "均匀份额的 {0}"],

  serving: ["Serving", "服务"],
  serving_hint: ["Last ten minutes, every two seconds", "最近十分钟，每两秒一点"],
  generated_rate: ["Generated", "生成"],
  prompt_rate: ["Prompt", "提示"],
  tokens_per_second: ["tokens/s", "词元/秒"],
  first_token: ["First token", "首词元"],
  per_token: ["Per token", "每词元"],
  median: ["median", "中位数"],
  running: ["Running", "运行中"],
  waiting: ["waiting {0}", "等待 {0}"],
  waiting_name: ["Waiting", "等待"],
  kv_cache: ["KV cache", "KV 缓存"],
  kv_blocks: ["{0} of {1} blocks", "{0} / {1} 块"],
  kv_used: ["KV used", "KV 占用"],
  throughput: ["Throughput, tokens/s", "吞吐量（词元/秒）"],
  load: ["Requests and KV cache", "请求数与 KV 缓存"],
  remap_mark: ["re-map to v{0}", "重映射至 v{0}"],

  usage: ["Expert use", "专家使用"],
  usage_hint: ["Colour: share of the layer's use against an even share. Click a cell for the expert.", "颜色：占本层使用量与均匀份额之比。点击格子查看专家。"],
  view: ["View", "视图"],
  view_use: ["use", "使用"],
  view_difference: ["difference A − B", "差异 A − B"],
  measure: ["Measure", "度量"],
  measure_count: ["activations", "激活次数"],
  measure_gate_mass: ["gate mass", "门控权重和"],
  phase: ["Phase", "阶段"],
  phase_all: ["both", "两者"],
  phase_prompt: ["prompt", "提示"],
  phase_generated: ["generated", "生成"],
  window: ["Window", "时间窗"],
  window_all: ["since reset", "自重置以来"],
  window_minutes: ["last {0} min", "最近 {0} 分钟"],
  window_hours: ["last {0} h", "最近 {0} 小时"],
  before_window: ["before the {0}", "{0}之前"],
  window_other: ["other…", "其他…"],
  minutes: ["Minutes", "分钟"],
  label: ["Domain", "领域"],
  label_all: ["all traffic", "全部流量"],
  label_tokens: ["{0} ({1} tokens)", "{0}（{1} 词元）"],
  label_side: ["Domain: {0}", "领域：{0}"],
  rest_side: ["all but domain {0}", "除领域 {0} 以外"],
  reference_file: ["reference file", "参照文件"],
  order: ["Order", "排序"],
  order_id: ["by expert", "按专家编号"],
  order_use: ["by use", "按使用量"],
  side_a: ["A", "A"],
  side_b: ["B", "B"],
  live: ["Live", "实时"],
  report: ["Report", "报告"],
  busiest: ["Busiest", "最忙"],
  most_different: ["Most different", "差异最大"],
  never_used: ["never used", "从未使用"],
  difference_scale: ["A − B, in even shares", "A − B（以均匀份额计）"],
  tokens_counted: ["{0} tokens in {1}", "{1} 内 {0} 词元"],
  max_to_mean: ["max/mean", "最大/均值"],
  entropy: ["entropy", "熵"],
  gini: ["Gini", "基尼"],
  jensen_shannon: ["JS, bits", "JS（比特）"],
  mean_divergence: ["mean Jensen-Shannon divergence {0} bits", "平均 JS 散度 {0} 比特"],
  grid_label: ["{0}: {1} layers by {2} experts. Arrow keys move, Enter selects.", "{0}：{1} 层 × {2} 专家。方向键移动，回车选择。"],

  grid_label_tokens: ["{0}: {1} layers by {2} tokens. Arrow keys move, Enter selects.", "{0}：{1} 层 × {2} 词元。方向键移动，回车选择。"],
  grid_label_pairs: ["{0}: {1} experts by {2} experts. Arrow keys move, Enter selects.", "{0}：{1} 专家 × {2} 专家。方向键移动，回车选择。"],

  expert_title: ["Expert", "专家"],
  expert_none: ["Click a cell in one of the grids.", "点击任一网格中的格子。"],
  activations: ["Activations", "激活次数"],
  prompt_generated: ["{0} prompt · {1} generated", "提示 {0} · 生成 {1}"],
  rank: ["Rank in its layer", "层内排名"],
  rank_of: ["{0} of {1}", "{0} / {1}"],
  gate_mass: ["Gate mass", "门控权重和"],
  mean_gate: ["{0} on average", "平均 {0}"],
  decaying_rate: ["Recent rate", "近期频率"],
  per_second: ["{0}/s", "{0} 次/秒"],
  half_life: ["weight halves every {0} min", "权重每 {0} 分钟减半"],
  last_activation: ["Last activation", "最近激活"],
  never: ["never", "从未"],
  in_memory: ["In memory", "占用内存"],
  projection: ["Projection", "投影"],
  source: ["Source", "来源"],
  format: ["Format", "格式"],
  reason_exact: ["exact name", "名称完全匹配"],
  reason_pattern: ["pattern {0}", "模式 {0}"],
  reason_default: ["no rule names it: default source", "没有规则提到它：默认来源"],
  bits: ["Bits", "位宽"],
  size: ["Size", "大小"],
  stage_this: ["Stage a change", "暂存更改"],
  show_coactivation: ["Co-activation", "共激活"],

  hints: ["Hints", "提示"],
  no_hints: ["Nothing stands out.", "没有明显异常。"],

  precision: ["Precision map", "精度图"],
  precision_hint: ["Gate, up and down of every expert. Drag or shift-click selects several.", "每个专家的 gate、up、down。拖动或按住 Shift 点击可多选。"],
  show: ["Show", "显示"],
  show_split: ["all projections", "全部投影"],
  hot_from: ["hot from", "热：≥"],
  cold_to: ["cold up to", "冷：≤"],
  hot_narrow: ["hot and narrow ({0})", "热而窄（{0}）"],
  cold_wide: ["cold and wide ({0})", "冷而宽（{0}）"],
  staged_mark: ["staged ({0})", "已暂存（{0}）"],
  one_width: ["All weights have one width: nothing is narrow or wide.", "所有权重位宽相同，没有宽窄之分。"],
  format_share: ["weights: {0}", "{0} 个权重"],
  bits_each: ["{0} bits", "{0} 位"],

  stage: ["Change the precision", "更改精度"],
  selected: ["{0} experts selected", "已选 {0} 个专家"],
  select_hot_narrow: ["Select hot and narrow", "选择热而窄"],
  select_cold_wide: ["Select cold and wide", "选择冷而宽"],
  select_layer: ["Select layer", "选择整层"],
  clear_selection: ["Clear", "清除"],
  take_from: ["take from", "取自"],
  stage_add: ["Stage", "暂存"],
  staged: ["Staged changes", "已暂存的更改"],
  nothing_staged: ["Nothing staged. Select experts, a source, and stage them.", "尚未暂存。先选择专家和来源，再点暂存。"],
  size_change: ["Expert weights: {0} → {1} ({2})", "专家权重：{0} → {1}（{2}）"],
  size_unknown: ["No weight comes from {0} yet: its size shows after applying.", "尚无权重来自 {0}：应用后才知道大小。"],
  apply: ["Apply", "应用"],
  applying: ["Applying…", "正在应用…"],
  discard: ["Discard", "放弃"],
  remove: ["Remove", "移除"],
  applied: ["Version {0} is live: {1} weights changed, {2} read, {3}.", "版本 {0} 已生效：更改 {1} 个权重，读取 {2}，用时 {3}。"],
  already: ["They come from there already.", "它们已取自该来源。"],

  inspector: ["Token inspector", "词元检视"],
  inspector_hint: ["Runs the text through the model and shows each token's experts. Not counted in the statistics.", "让文本通过模型，显示每个词元所用的专家。不计入统计。"],
  text: ["Text", "文本"],
  as_chat: ["as a chat message", "作为对话消息"],
  trace: ["Trace", "追踪"],
  tracing: ["Tracing…", "追踪中…"],
  color_by: ["Coloured by the top expert of", "着色：首选专家，"],
  routes: ["Top expert per layer and token", "各层各词元的首选专家"],
  token_n: ["Token {0}", "词元 {0}"],
  token_id: ["id {0}", "编号 {0}"],
  experts_by_gate: ["Experts by gate weight", "按门控权重排列的专家"],
  gate_weight: ["gate {0}", "门控 {0}"],

  concentration: ["Concentration", "集中度"],
  concentration_hint: ["Share of use covered by the busiest experts", "最忙专家所覆盖的使用份额"],
  experts_share: ["experts, busiest first", "专家（从最忙起）"],
  even: ["even", "均匀"],
  saved_set: ["saved: {0}", "已保存：{0}"],
  set_name: ["name of a set", "集合名称"],
  save_set: ["Save counts as reference", "保存为参照"],
  each_layer: ["layers", "各层"],
  all_layers: ["mean", "平均"],
  coverage: ["For {0}% of use", "覆盖 {0}%"],
  coverage_value: ["{0} of {1}", "{0} / {1}"],
  coactivation: ["Co-activation", "共激活"],
  coactivation_hint: ["How often two experts share a token, against chance", "两专家同时被一个词元选中的频率与随机之比"],
  pair: ["Pair", "组合"],
  tokens: ["Tokens", "词元"],
  lift: ["Lift", "提升"],
  sampled: ["{0} tokens sampled", "采样 {0} 词元"],
  within: ["within the layer", "层内"],
  no_next_layer: ["No layer with experts follows this one.", "此层之后没有含专家的层。"],
  to_next: ["to the next layer", "到下一层"],
  relation: ["Relation", "关系"],
  drift: ["Drift", "漂移"],
  drift_hint: ["Jensen-Shannon divergence of the experts' use, per layer", "各层专家使用分布的 JS 散度"],
  no_divergence: ["One of the two has no activations, so there is nothing to compare. In a server's first minutes nothing was counted before them: wait, or choose another reference.", "两者之一没有激活，无法比较。服务器启动后的最初几分钟，之前没有统计：请稍候，或选择其他参照。"],
  now_side: ["Now", "当前"],
  reference_side: ["Reference", "参照"],

  memory: ["Memory by format", "各格式内存"],
  weights_total: ["Weights", "权重"],
  weights_count: ["Count", "数量"],
  parameters: ["Parameters", "参数"],
  kv_bytes: ["KV cache", "KV 缓存"],
  peak: ["Process peak", "进程峰值"],
  bits_per_parameter: ["Bits/param", "位/参数"],
  share_short: ["Share", "占比"],
  sources: ["Sources", "来源"],
  remaps: ["Re-maps", "重映射"],
  no_remaps: ["None so far.", "尚无。"],
  when: ["When", "时间"],
  version: ["Version", "版本"],
  changed: ["Changed", "更改"],
  read: ["Read", "读取"],
  took: ["Took", "用时"],
  result: ["Result", "结果"],
  ok: ["ok", "成功"],
  refused: ["refused", "被拒绝"],

  playground: ["Playground", "试用"],
  mode: ["Mode", "模式"],
  mode_text: ["continue a text", "续写文本"],
  mode_chat: ["chat", "对话"],
  prompt: ["Prompt", "提示词"],
  message: ["Message", "消息"],
  max_tokens: ["Max tokens", "最多词元"],
  temperature: ["Temperature", "温度"],
  top_p: ["Top p", "Top p"],
  seed: ["Seed", "随机种子"],
  any_seed: ["random", "随机"],
  domain: ["Domain", "领域"],
  domain_hint: ["optional label", "可选标签"],
  generate: ["Generate", "生成"],
  stop: ["Stop", "停止"],
  new_chat: ["New chat", "新对话"],
  output: ["Output", "输出"],
  output_empty: ["The answer appears here as it is generated.", "生成的文本将显示在此处。"],
  experts_used: ["Experts it used", "所用专家"],
  experts_used_hint: ["Tokens per expert in this answer and its prompt", "本次提示与回答中各专家处理的词元数"],
  experts_used_in_answer: ["Tokens per expert in this answer alone, without the conversation before it", "仅本次回答（不含之前的对话）中各专家处理的词元数"],
  speed: ["{0} tokens/s", "{0} 词元/秒"],
  generation_figures: ["{0} prompt + {1} generated tokens · first after {2} · {3} tokens/s · {4}", "提示 {0} + 生成 {1} 词元 · 首词元 {2} · {3} 词元/秒 · {4}"],
  finish_stop: ["ended by itself", "自然结束"],
  finish_length: ["length limit", "达到长度上限"],
  finish_cancelled: ["stopped", "已停止"],
  you: ["You", "你"],
  model: ["Model", "模型"],
};

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // storage may be switched off
  }
}

export function language() {
  return current;
}

export function t(key, ...values) {
  const text = WORDS[key]?.[current === "zh" ? 1 : 0] ?? key;
  return text.replace(/\{(\d)\}/g, (_, index) => values[index] ?? "");
}

export function setLanguage(choice, isChosen = true) {
  current = choice === "zh" ? "zh" : "en";
  if (isChosen) {
    try {
      localStorage.setItem(KEY, current);
    } catch {
      // remembered for as long as the page is open
    }
  }
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const listener of listeners) listener();
}

export function onLanguage(listener) {
  listeners.push(listener);
}

export function startLanguage() {
  const preferred = navigator.languages?.[0] ?? navigator.language ?? "en";
  setLanguage(stored() ?? (preferred.toLowerCase().startsWith("zh") ? "zh" : "en"), false);
}
