// The words that all pages have: [English, Chinese].

export const COMMON = {
  to_theme: ["Switch between light and dark", "切换明暗主题"],
  to_language: ["中文", "English"],
  cancel: ["Cancel", "取消"],
  key: ["API key", "API 密钥"],
  key_title: ["This server wants a key", "此服务器需要密钥"],
  key_refused: ["The server has refused the key.", "服务器拒绝了该密钥。"],
  key_letters: ["A key has Latin letters, digits and signs only, and no spaces.", "密钥只能由英文字母、数字和符号组成，不含空格。"],
  key_kept: ["It is kept in this tab until you close it.", "密钥只保存在此标签页中，关闭后即清除。"],
  use_key: ["Use this key", "使用此密钥"],
};
