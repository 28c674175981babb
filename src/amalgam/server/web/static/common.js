// The words that all pages have: [English, Chinese].

export const COMMON = {
  to_theme: ["Switch between light and dark", "切换明暗主题"],
  to_language: ["中文", "English"],
};
